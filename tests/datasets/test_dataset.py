"""Demonstrations on disk: what is written comes back, and damage is named without spoiling the rest."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from torchrl_vla.checkpoints.statistics import read_statistics
from torchrl_vla.datasets import (
    CorruptEpisodeError,
    DemonstrationDataset,
    DemonstrationIndex,
    Episode,
    compute_statistics,
    read_episode,
    write_episode,
)
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.openvla.image_pipeline import lanczos3_resize
from torchrl_vla.modules.openvla.jpeg import encode_jpeg, jpeg_round_trip

SUITE = "libero_spatial"


def frames(steps: int, seed: int = 0, size: int = 32) -> np.ndarray:
    """Smooth pictures, no two alike."""
    coarse = torch.rand(steps, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def make_episode(steps: int = 5, task_id: int = 0, seed: int = 0, action_dim: int = 7) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    action = torch.rand(steps, action_dim, generator=generator) * 2 - 1
    action[:, -1] = torch.where(torch.arange(steps) < steps // 2, -1.0, 1.0)
    return Episode(
        state=torch.rand(steps, 8, generator=generator),
        action=action,
        executed_action=action * 0.5,
        images={"image": [encode_jpeg(frame) for frame in frames(steps, seed)]},
        task_id=task_id,
        init_state_id=3,
        instruction=f"task {task_id}",
        seed=seed,
    )


def make_dataset(folder: Path, per_task: tuple[int, ...] = (2, 2), *, action_dim: int = 7) -> Path:
    index = DemonstrationIndex(SUITE, {task_id: f"task {task_id}" for task_id in range(len(per_task))})
    for task_id, count in enumerate(per_task):
        for number in range(count):
            name = index.episode_name(task_id, number)
            episode = make_episode(5 + number, task_id, seed=10 * task_id + number, action_dim=action_dim)
            write_episode(folder / "episodes" / name, episode)
            index.outcomes[name] = "success"
    folder.mkdir(exist_ok=True)
    index.save(folder)
    if sum(per_task):
        DemonstrationDataset(folder).update_statistics()
    return folder


def test_an_episode_comes_back_as_written(tmp_path: Path):
    episode = make_episode()
    write_episode(tmp_path / "000000", episode)
    data = read_episode(tmp_path / "000000")
    assert torch.equal(data["state"], episode.state)
    assert torch.equal(data["action"], episode.action)
    assert torch.equal(data["executed_action"], episode.action * 0.5)
    assert (data["task_id"], data["init_state_id"], data["seed"], data["instruction"]) == (0, 3, 0, "task 0")
    blob, offsets = data["images", "image", "jpeg"].numpy().tobytes(), data["images", "image", "offsets"].tolist()
    assert [blob[a:b] for a, b in zip(offsets, offsets[1:], strict=False)] == list(episode.images["image"])
    assert [path.name for path in tmp_path.iterdir()] == ["000000"]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_episode(tmp_path / "000000", make_episode())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_and_earlier_episodes_stay_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_episode(tmp_path / "000000", make_episode())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match="no room"):
        write_episode(tmp_path / "000001", make_episode())
    assert [path.name for path in tmp_path.iterdir()] == ["000000"]
    assert len(read_episode(tmp_path / "000000")["action"]) == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "meta.json").unlink(), "meta.json is missing"),
        (lambda folder: (folder / "meta.json").write_text("{"), "Expecting"),
        (lambda folder: (folder / "state.memmap").write_bytes(b"\0" * 8), "state.memmap has 8 bytes instead of 160"),
        (lambda folder: (folder / "images" / "image" / "jpeg.memmap").unlink(), "jpeg.memmap has 0 bytes"),
        (lambda folder: shutil.rmtree(folder / "images"), "meta.json is missing"),
        (lambda folder: zero_bytes(folder / "images" / "image" / "jpeg.memmap", 0), "frame 0 of image does not start"),
        (lambda folder: zero_bytes(folder / "images" / "image" / "jpeg.memmap", -1), "frame 4 of image does not end"),
        (lambda folder: zero_bytes(folder / "images" / "image" / "offsets.memmap", -1), "offsets of image"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str):
    write_episode(tmp_path / "000007", make_episode())
    damage(tmp_path / "000007")
    with pytest.raises(CorruptEpisodeError, match=message) as caught:
        read_episode(tmp_path / "000007")
    assert "000007" in str(caught.value)


def test_any_byte_of_the_metadata_may_be_wrong(tmp_path: Path):
    write_episode(tmp_path / "000007", make_episode())
    for path in (tmp_path / "000007").rglob("meta.json"):
        content = path.read_bytes()
        for position in range(0, len(content), 3):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0x84]) + content[position + 1 :])
            with contextlib.suppress(CorruptEpisodeError):
                read_episode(tmp_path / "000007")
        path.write_bytes(content)


def zero_bytes(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position if position >= 0 else len(content) + position] = 0x55
    path.write_bytes(content)


def test_a_damaged_episode_leaves_the_rest_usable(tmp_path: Path):
    folder = make_dataset(tmp_path)
    (folder / "episodes" / "000001" / "action.memmap").write_bytes(b"")
    with pytest.warns(UserWarning, match="000001"):
        dataset = DemonstrationDataset(folder)
    assert list(dataset.episodes) == ["000000", "010000", "010001"]


def test_a_frame_that_cannot_be_decoded_drops_its_episode_alone(tmp_path: Path):
    folder = make_dataset(tmp_path)
    path = folder / "episodes" / "000000" / "images" / "image" / "jpeg.memmap"
    content = bytearray(path.read_bytes())
    content[2:40] = bytes(38)  # the first frame's tables; its two markers stay
    path.write_bytes(content)
    dataset = DemonstrationDataset(folder)
    with pytest.warns(UserWarning, match="000000 cannot be decoded"):
        samples = dataset.samples(ActionTokenizer(dataset.statistics), image_size=28)
    assert len(samples) == 6 + 5 + 6
    assert torch.equal(samples["observation", "state"][:6], dataset.episodes["000001"]["state"])


def test_statistics_are_in_openvlas_convention(tmp_path: Path):
    action = np.zeros((101, 7))
    action[:, 0] = np.arange(101)
    action[:, 6] = 1.0  # closed: 0 in the data sets' convention
    state = np.tile(np.arange(101)[:, None], (1, 8)) * 2.0
    statistics = compute_statistics([action[:50], action[50:]], [state[:50], state[50:]])
    assert statistics["action"]["q01"][0] == pytest.approx(1.0)
    assert statistics["action"]["q99"][0] == pytest.approx(99.0)
    assert statistics["action"]["mean"][6] == 0.0
    assert statistics["action"]["mask"] == [True] * 6 + [False]
    assert statistics["action"]["std"][0] == pytest.approx(np.sqrt((101**2 - 1) / 12))
    assert (statistics["proprio"]["min"][7], statistics["proprio"]["max"][7]) == (0.0, 200.0)
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (101, 2)


def test_the_tokenizer_reads_the_data_sets_statistics(tmp_path: Path):
    folder = make_dataset(tmp_path)
    tokenizer = ActionTokenizer(read_statistics(folder)[SUITE])
    assert tokenizer.action_q99.tolist() == DemonstrationDataset(folder).statistics["action"]["q99"]


def test_samples(tmp_path: Path):
    folder = make_dataset(tmp_path, (1, 1))
    dataset = DemonstrationDataset(folder)
    tokenizer = ActionTokenizer(dataset.statistics)
    samples = dataset.samples(tokenizer, image_size=28, chunk_size=3)
    first = make_episode(5, 0, seed=0)
    assert samples.batch_size == torch.Size([10])
    assert samples["task_id"].squeeze(-1).tolist() == [0] * 5 + [1] * 5
    # The chunk of step 3 ends after the episode: its third action is the last one again, and masked.
    assert torch.equal(samples["action"][3], first.action[[3, 4, 4]])
    assert samples["mask"][:5].tolist() == [[True] * 3] * 3 + [[True, True, False], [True, False, False]]
    assert torch.equal(samples["vla_action", "tokens"], tokenizer.encode(tokenizer.from_env(samples["action"])))
    # What is learned from is what evaluation makes of the same frame before it cuts the centre out.
    raw = torch.from_numpy(frames(5, seed=0)).permute(0, 3, 1, 2)
    assert torch.equal(samples["observation", "image"][:5], lanczos3_resize(jpeg_round_trip(raw), 28))


@pytest.mark.parametrize(
    ("per_task", "held_out", "train", "validation"),
    [
        (None, 1, ["000000", "000001", "010000"], ["000002"]),
        (None, 0, ["000000", "000001", "000002", "010000"], []),
        (1, 1, ["000000", "010000"], ["000002"]),
        (None, 9, ["000000", "010000"], ["000001", "000002"]),
    ],
)
def test_split(tmp_path: Path, per_task, held_out, train, validation):
    dataset = DemonstrationDataset(make_dataset(tmp_path, (3, 1)))
    assert dataset.split(per_task=per_task, held_out=held_out) == (train, validation)


def test_bad_data_sets_are_explained(tmp_path: Path):
    with pytest.raises(ValueError, match="no data set of demonstrations"):
        DemonstrationDataset(tmp_path)
    with pytest.raises(ValueError, match="nothing to learn from"):
        DemonstrationDataset(make_dataset(tmp_path / "empty", (0, 0)))
    folder = make_dataset(tmp_path / "good", (1,))
    (folder / "dataset_statistics.json").unlink()
    with pytest.raises(ValueError, match="no dataset_statistics.json"):
        _ = DemonstrationDataset(folder).statistics
    (folder / "dataset_statistics.json").write_text('{"libero_spatial": {"act')
    with pytest.raises(ValueError, match="dataset_statistics.json is not valid JSON.*`torchrl-vla demos`"):
        _ = DemonstrationDataset(folder).statistics
    other = make_dataset(tmp_path / "other", (1,), action_dim=8)
    with pytest.raises(ValueError, match="Episode 000000 has actions of 8 numbers, the policy has 7"):
        DemonstrationDataset(other).samples(ActionTokenizer(), image_size=28)
    with pytest.raises(ValueError, match="recorded with image and not wrist_image"):
        dataset = DemonstrationDataset(make_dataset(tmp_path / "one_camera", (1,)))
        dataset.samples(ActionTokenizer(), image_size=28, image_keys=("image", "wrist_image"))
    (folder / "dataset.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="not in the format"):
        DemonstrationDataset(folder)


def test_the_index_counts_by_task(tmp_path: Path):
    index = DemonstrationIndex(SUITE, {0: "a", 4: "b"})
    index.outcomes = {"000000": "success", "040000": "failed", "040001": "dropped: no answer", "040002": "success"}
    index.save(tmp_path)
    loaded = DemonstrationIndex.load(tmp_path)
    assert loaded == index
    assert loaded.counts() == {0: {"success": 1}, 4: {"success": 1, "failed": 1, "dropped": 1}}
