"""Demonstrations in LeRobot's format, through LeRobot's own writer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import simplejpeg
from tqdm import tqdm

from torchrl_vla.datasets.demonstrations import DemonstrationDataset
from torchrl_vla.errors import UserError

__all__ = ["check_lerobot", "export_lerobot"]

#: Control steps, and so frames, per second.
_FPS = 20


def check_lerobot(folder: Path) -> None:
    """Make sure that an export can be written, before any long work starts.

    Args:
        folder: where it is to go.

    Raises:
        ValueError: the library `lerobot` is not installed or cannot choose the films' codec, or the folder exists.
    """
    if importlib.util.find_spec("lerobot") is None:
        raise UserError(
            "export_lerobot needs the library lerobot, which is not installed: pip install lerobot, in an environment "
            "of its own if it asks for another PyTorch; `torchrl-vla demos` with the same --out records nothing twice."
        )
    if folder.exists():
        raise UserError(f"{folder} exists already, and LeRobot writes to a new folder only: choose another one.")
    try:
        # A library of its own that users of the export install.
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        lacking = "" if "vcodec" in inspect.signature(LeRobotDataset.create).parameters else "it takes no vcodec"
    except ImportError as error:
        lacking = str(error)
    if lacking:
        raise UserError(
            "export_lerobot needs LeRobotDataset.create(vcodec=...), which lerobot has from 0.4.3 on; installed is "
            f"lerobot {importlib.metadata.version('lerobot')} ({lacking}): pip install 'lerobot>=0.4.3'."
        )


def export_lerobot(dataset: DemonstrationDataset, folder: Path) -> int:
    """Write a data set of LeRobot's: `observation.images.*` as H.264 films, `observation.state`, `action`, the task.

    Actions are the expert's labels, in the environment's convention (gripper -1 open, +1 close).

    Args:
        dataset: the demonstrations.
        folder: made here; `LeRobotDataset(repo_id=folder.name, root=folder)` reads it.

    Returns:
        The number of episodes.

    Raises:
        ValueError: see :func:`check_lerobot`.
    """
    check_lerobot(folder)
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    first = next(iter(dataset.episodes.values()))
    features: dict[str, dict[str, Any]] = {
        f"observation.images.{key}": {
            "dtype": "video",
            "shape": _frame(first, key, 0).shape,
            "names": ["height", "width", "channels"],
        }
        for key in sorted(first["images"].keys())
    }
    for name, values in (("observation.state", first["state"]), ("action", first["action"])):
        features[name] = {"dtype": "float32", "shape": (values.shape[-1],), "names": None}
    target = LeRobotDataset.create(
        repo_id=folder.name, fps=_FPS, features=features, root=folder, robot_type="panda", vcodec="h264"
    )
    for episode in tqdm(dataset.episodes.values(), desc="LeRobot export", unit="episode"):
        for step in range(len(episode["action"])):
            frame = {f"observation.images.{key}": _frame(episode, key, step) for key in episode["images"].keys()}  # noqa: SIM118
            frame["observation.state"] = episode["state"][step].numpy()
            frame["action"] = episode["action"][step].numpy()
            target.add_frame({**frame, "task": episode["instruction"]})
        target.save_episode()
    target.finalize()
    return len(dataset.episodes)


def _frame(episode: Any, key: str, step: int) -> Any:
    """Return a frame, uint8 [H, W, 3]."""
    camera = episode["images", key]
    start, end = camera["offsets"][step : step + 2].tolist()
    return simplejpeg.decode_jpeg(camera["jpeg"][start:end].numpy())
