"""LeRobot's format: what is handed to LeRobot's writer. The library itself is not among the development packages."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from torchrl_vla.cli import main
from torchrl_vla.datasets import DemonstrationDataset, DemonstrationIndex, Episode, write_episode
from torchrl_vla.datasets.lerobot_export import export_lerobot
from torchrl_vla.modules.openvla.jpeg import encode_jpeg


@pytest.fixture
def dataset(tmp_path: Path) -> DemonstrationDataset:
    """Two tasks of one episode each, whose frames are one colour that grows by 10 each step."""
    folder = tmp_path / "data"
    index = DemonstrationIndex("libero_spatial", {0: "push", 1: "pick"})
    for task_id, instruction in index.instructions.items():
        steps = 3 + task_id
        action = torch.arange(steps * 7.0).reshape(steps, 7) / 30
        frames = [np.full((32, 32, 3), 50 + 10 * step, np.uint8) for step in range(steps)]
        images = {"image": [encode_jpeg(frame) for frame in frames]}
        state = torch.full((steps, 8), float(task_id))
        episode = Episode(state, action, action * 0, images, task_id, 0, instruction, 0)
        write_episode(folder / "episodes" / index.episode_name(task_id, 0), episode)
        index.outcomes[index.episode_name(task_id, 0)] = "success"
    index.save(folder)
    return DemonstrationDataset(folder)


class _Writer:
    """Takes what LeRobotDataset of lerobot 0.4.3 takes, and keeps it."""

    made: _Writer

    @classmethod
    def create(
        cls,
        repo_id: str,
        fps: int,
        features: dict,
        root: str | Path | None = None,
        robot_type: str | None = None,
        use_videos: bool = True,
        tolerance_s: float = 1e-4,
        image_writer_processes: int = 0,
        image_writer_threads: int = 0,
        video_backend: str | None = None,
        batch_encoding_size: int = 1,
        vcodec: str = "libsvtav1",
    ) -> _Writer:
        arguments = {**locals()}
        cls.made = cls()
        cls.made.arguments, cls.made.frames, cls.made.ends, cls.made.final = arguments, [], [], False
        return cls.made

    def add_frame(self, frame: dict) -> None:
        self.frames.append(frame)

    def save_episode(self) -> None:
        self.ends.append(len(self.frames))

    def finalize(self) -> None:
        self.final = True


class _OldWriter:
    """LeRobotDataset of lerobot 0.4.2."""

    @classmethod
    def create(cls, repo_id: str, fps: int, features: dict, root: Path | None = None, robot_type: str | None = None):
        raise AssertionError("it was called")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[type | None, str], None]:
    """Puts a writer where lerobot's is."""

    def install(writer: type | None, version: str) -> None:
        package, datasets = types.ModuleType("lerobot"), types.ModuleType("lerobot.datasets")
        module = types.ModuleType("lerobot.datasets.lerobot_dataset")
        module.LeRobotDataset = writer
        package.__spec__ = types.SimpleNamespace()
        for part in (package, datasets, module):
            monkeypatch.setitem(sys.modules, part.__name__, part)
        if writer is None:
            monkeypatch.setitem(sys.modules, module.__name__, None)
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)

    return install


def test_every_step_is_handed_over(dataset: DemonstrationDataset, tmp_path: Path, install: Callable[..., None]):
    install(_Writer, "0.4.3")
    assert export_lerobot(dataset, tmp_path / "lerobot") == 2
    made = _Writer.made
    assert made.ends == [3, 7] and made.final
    assert made.arguments["fps"] == 20 and made.arguments["root"] == tmp_path / "lerobot"
    assert made.arguments["vcodec"] == "h264"
    shapes = {name: feature["shape"] for name, feature in made.arguments["features"].items()}
    assert shapes == {"observation.images.image": (32, 32, 3), "observation.state": (8,), "action": (7,)}
    assert [frame["task"] for frame in made.frames] == ["push"] * 3 + ["pick"] * 4
    fifth = made.frames[4]
    np.testing.assert_allclose(fifth["action"], np.arange(7, 14) / 30, rtol=1e-6)
    assert fifth["observation.state"].tolist() == [1.0] * 8
    assert np.abs(fifth["observation.images.image"].astype(int) - 60).max() <= 1


@pytest.mark.parametrize(("writer", "version"), [(_OldWriter, "0.4.2"), (None, "0.1.0")])
def test_a_library_that_is_too_old_is_said_before_anything_is_recorded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    install: Callable[..., None],
    writer: type | None,
    version: str,
):
    install(writer, version)
    monkeypatch.setattr("torchrl_vla.demonstrations.collect.collect_demonstrations", None)
    with pytest.raises(SystemExit, match=rf"(?s)from 0\.4\.3 on.*lerobot {version}.*pip install 'lerobot>=0\.4\.3'"):
        main(["demos", "--out", str(tmp_path / "data"), "--export-lerobot", str(tmp_path / "lerobot")])
    assert not (tmp_path / "data").exists()


def test_a_missing_library_is_said_before_anything_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lerobot", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs the library lerobot, which is not installed: pip install lerobot"):
        main(["demos", "--out", str(tmp_path / "data"), "--export-lerobot", str(tmp_path / "lerobot")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (tmp_path / "lerobot").mkdir()
    with pytest.raises(SystemExit, match="exists already, and LeRobot writes to a new folder only"):
        main(["demos", "--out", str(tmp_path / "data"), "--export-lerobot", str(tmp_path / "lerobot")])
    assert not (tmp_path / "data").exists()
