"""A checkpoint folder, read once: what loading, judging, describing and exporting it start from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torchrl_vla.checkpoints.architecture_file import read_architecture
from torchrl_vla.checkpoints.head_files import find_heads
from torchrl_vla.checkpoints.integrity import CHECKSUMS, find_damage
from torchrl_vla.checkpoints.shards import Shards, read_shards, stored_dtype
from torchrl_vla.errors import UserError
from torchrl_vla.modules.openvla.architecture import OpenVLAConfig

__all__ = ["CheckpointFolder", "open_checkpoint"]


@dataclass(frozen=True)
class CheckpointFolder:
    """What the small files of a checkpoint say, its weights not read.

    Args:
        path: the folder.
        config: the architecture, with the action statistics; its dtype is that of the shards.
        shards: what each shard holds, by path.
        heads: files of the heads by kind, ``proprio_projector`` and ``action_head``.
    """

    path: Path
    config: OpenVLAConfig
    shards: Shards
    heads: Mapping[str, Path]


def open_checkpoint(folder: str | Path) -> CheckpointFolder:
    """Read the small files of a checkpoint folder, each once; where it has checksums, they are compared first.

    Args:
        folder: a checkpoint folder.

    Raises:
        ValueError: a file is missing, damaged or of another model.
    """
    folder = Path(folder)
    if (folder / CHECKSUMS).is_file():
        _verify(folder, _state(folder))
    config = read_architecture(folder)
    heads, shards = find_heads(folder), read_shards(folder)
    # Converted shards often keep the configuration of those they were made from.
    dtype = stored_dtype(shards) or config.torch_dtype
    return CheckpointFolder(folder, replace(config, torch_dtype=dtype), shards, heads)


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a file of a folder does."""
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((path.as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in found)


@functools.lru_cache(maxsize=8)  # a policy is opened more than once, and gigabytes are read once
def _verify(folder: Path, state: tuple[tuple[str, int, int], ...]) -> None:
    """Compare a folder's files with its checksums.

    Args:
        folder: of a policy.
        state: of its files, so that changed ones are compared again.

    Raises:
        ValueError: one of them is not as it was written.
    """
    if damage := find_damage(folder, complete=False):
        raise UserError(
            f"{folder} is damaged: {'; '.join(damage[:3])}. Copy or write it again; if a file was changed on purpose, "
            f"delete {CHECKSUMS} there."
        )
