"""One demonstration on disk: a memory-mapped TensorDict in a folder of its own, written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from torchrl_vla.errors import UserError
from torchrl_vla.files import flush_tree

__all__ = ["CorruptEpisodeError", "Episode", "read_episode", "write_episode"]

# A full file system kills a process that writes through a memory map, so room is made sure of before: this much more
# than the episode needs, since other processes may be writing too.
_RESERVE_BYTES = 64 * 2**20
_JPEG_START, _JPEG_END = (0xFF, 0xD8), (0xFF, 0xD9)


class CorruptEpisodeError(UserError):
    """An episode's folder does not hold what was written: files are missing, cut short or damaged."""


@dataclass(frozen=True)
class Episode:
    """A demonstration of ``T`` control steps.

    Args:
        state: float32 [T, 8], the robot's state before each step, as ``("observation", "state")`` has it.
        action: float32 [T, D], what should be done there: the label, in the environment's convention (gripper -1 open,
            +1 close).
        executed_action: float32 [T, D], what was done: the label plus perturbations.
        images: JPEG-encoded upright frames [T] seen before each step, by their key under ``"observation"``: ``"image"``
            and, if it was asked for, ``"wrist_image"``.
        task_id: index of the task in its suite.
        init_state_id: the initial state it started from.
        instruction: what was to be done.
        seed: of the perturbations.

    Raises:
        ValueError: if the lengths or widths differ, or a number is not finite.
    """

    state: Tensor
    action: Tensor
    executed_action: Tensor
    images: Mapping[str, Sequence[bytes]]
    task_id: int
    init_state_id: int
    instruction: str
    seed: int

    def __post_init__(self) -> None:
        steps = len(self.action)
        lengths = {"state": len(self.state), "executed_action": len(self.executed_action)}
        lengths |= {key: len(frames) for key, frames in self.images.items()}
        for name, length in lengths.items():
            if length != steps or not steps:
                raise UserError(
                    f"an episode of {steps} actions has {length} of {name}: both must be equal, at least 1."
                )
        if self.executed_action.shape != self.action.shape:
            raise UserError(
                f"executed_action {list(self.executed_action.shape)} and action {list(self.action.shape)} differ."
            )
        for name in ("state", "action", "executed_action"):
            if not torch.isfinite(getattr(self, name)).all():
                raise UserError(f"{name} holds NaN or infinity; every entry of a demonstration must be a number.")

    def to_tensordict(self) -> TensorDict:
        """Return the entries as they are stored; each camera's JPEGs are one blob with offsets [T + 1]."""
        images = {}
        for key, frames in self.images.items():
            offsets = torch.tensor([0, *(len(frame) for frame in frames)]).cumsum(0)
            # bytearray: a tensor over read-only bytes would warn.
            images[key] = {"jpeg": torch.frombuffer(bytearray().join(frames), dtype=torch.uint8), "offsets": offsets}
        return TensorDict(
            {
                "state": self.state.float(),
                "action": self.action.float(),
                "executed_action": self.executed_action.float(),
                "images": images,
                "task_id": torch.tensor(self.task_id),
                "init_state_id": torch.tensor(self.init_state_id),
                "seed": torch.tensor(self.seed),
                "instruction": self.instruction,
            }
        )


def write_episode(folder: Path, episode: Episode) -> None:
    """Write an episode: at once visible and whole, or not at all.

    Args:
        folder: its folder, which must not exist yet; the one above is made if need be.
        episode: the demonstration.

    Raises:
        OSError: the disk is too full (``ENOSPC``), or cannot be written to. Earlier episodes are untouched.
    """
    data = episode.to_tensordict()
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < data.bytes() + _RESERVE_BYTES:
        raise OSError(errno.ENOSPC, f"no room for an episode of {data.bytes():,} bytes", str(folder))
    try:
        data.memmap(partial)
        flush_tree(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_episode(folder: Path) -> TensorDict:
    """Open an episode; its arrays are mapped, not read.

    Args:
        folder: as it was written.

    Returns:
        ``state`` [T, 8], ``action`` and ``executed_action`` [T, D], ``("images", key, "jpeg")`` uint8 [bytes] and
        ``("images", key, "offsets")`` int64 [T + 1], ``task_id``, ``init_state_id``, ``seed`` [] and ``instruction``.

    Raises:
        CorruptEpisodeError: a file is missing, cut short or damaged.
    """
    try:
        _check_files(folder)
        data = TensorDict.load_memmap(folder)
        steps = len(data["action"])
        if not steps or len(data["state"]) != steps or data["executed_action"].shape != data["action"].shape:
            raise CorruptEpisodeError("state, action and executed_action differ in length")
        for name in ("state", "action", "executed_action"):
            if not torch.isfinite(data[name]).all():
                raise CorruptEpisodeError(f"{name} holds NaN or infinity")
        for key in data["images"].keys():  # noqa: SIM118
            _check_frames(key, data["images", key, "jpeg"], data["images", key, "offsets"], steps)
        for name in ("task_id", "init_state_id", "seed", "instruction"):
            data.get(name)
    except CorruptEpisodeError as error:
        raise CorruptEpisodeError(f"{folder}: {error}.") from None
    except (KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:  # any byte may be wrong
        raise CorruptEpisodeError(f"{folder}: {error}.") from error
    return data


def _check_files(folder: Path) -> None:
    """Compare the files' sizes with what the metadata say: mapping a short file would lengthen it, with zeros."""
    meta_file = folder / "meta.json"
    if not meta_file.is_file():
        raise CorruptEpisodeError(f"{meta_file.name} is missing")
    meta: dict[str, Any] = json.loads(meta_file.read_text(encoding="utf-8"))
    for name, entry in meta.items():
        if not isinstance(entry, dict):
            continue
        if "shape" in entry and "dtype" in entry:
            expected = math.prod(entry["shape"]) * getattr(torch, entry["dtype"].removeprefix("torch.")).itemsize
            path = folder / f"{name}.memmap"
            size = path.stat().st_size if path.is_file() else 0
            if size != expected:
                raise CorruptEpisodeError(f"{path.name} has {size:,} bytes instead of {expected:,}")
        elif (folder / name).is_dir() or entry.get("type") == "TensorDict":
            _check_files(folder / name)


def _check_frames(key: str, jpeg: Tensor, offsets: Tensor, steps: int) -> None:
    blob, bounds = jpeg.numpy(), offsets.numpy()
    if len(bounds) != steps + 1 or bounds[0] != 0 or bounds[-1] != len(blob) or (np.diff(bounds) < 4).any():
        raise CorruptEpisodeError(f"the offsets of {key} do not fit its JPEG bytes")
    for name, start, marker in (("start", bounds[:-1], _JPEG_START), ("end", bounds[1:] - 2, _JPEG_END)):
        found = np.stack([blob[start], blob[start + 1]], axis=1)
        bad = np.flatnonzero((found != marker).any(axis=1))
        if len(bad):
            raise CorruptEpisodeError(f"frame {bad[0]} of {key} does not {name} as a JPEG does")
