"""Files of a checkpoint folder: the shards and what their headers say, and the files of the heads."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from torchrl_vla.checkpoints.files import read_json

_logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FOREIGN_HEADS = {"vision_backbone": "FiLM", "noisy_action_projector": "a diffusion head"}
"""What upstream trained a checkpoint with, by the kind of the ``KIND--N_checkpoint.pt`` that it left."""

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor.

    Args:
        shape: its shape.
        dtype: its dtype, as safetensors calls it (``BF16``, ``F32``).
    """

    shape: tuple[int, ...]
    dtype: str


def find_shards(folder: Path) -> dict[Path, list[str]]:
    """The names of the tensors in each shard, by path.

    Raises:
        ValueError: if there are no weights, or a shard of the index is missing.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX} has no weight_map, so it is no index of shards: download it again.")
        weight_map: dict[str, str] = index["weight_map"]
        shards: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(folder / file, []).append(name)
    elif (folder / SINGLE).is_file():
        shards = {folder / SINGLE: list(read_header(folder / SINGLE))}
    else:
        raise ValueError(f"{folder} has neither {INDEX} nor {SINGLE}: it holds no weights.")
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: download the missing files.")
    return shards


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a shard by name, read from its header alone.

    Raises:
        ValueError: if the file is truncated or none of safetensors'.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {name: TensorInfo(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): download it again.") from error


def check_shards(shards: dict[Path, list[str]], expected: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """Compare what is in the shards with what the model needs, before anything is loaded.

    Args:
        shards: from :func:`find_shards`.
        expected: shapes by upstream's name.

    Returns:
        The tensors found, by name.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape.
    """
    found: dict[str, TensorInfo] = {}
    for path, names in shards.items():
        header = read_header(path)
        absent = sorted(set(names) - set(header))
        if absent:
            raise ValueError(f"{path} lacks {listed(absent)}, which {INDEX} says it has: download it again.")
        found |= {name: header[name] for name in names}
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            raise ValueError(
                f"{name} is {list(found[name].shape)} in the checkpoint, but its config.json makes it {list(shape)}: "
                "the configuration is of another model."
            )
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise ValueError(f"the checkpoint lacks {listed(missing)}: its configuration is of another model.")
    if unknown:
        raise ValueError(f"the checkpoint has {listed(unknown)}, which an OpenVLA has no place for.")
    return found


def stored_dtype(shards: Iterable[Path]) -> str | None:
    """The dtype of most weights, as ``config.json`` calls it, from the headers of the shards.

    Args:
        shards: their paths.

    Returns:
        ``float32``, ``bfloat16`` or ``float16``; None where no tensor is of one of these.

    Raises:
        ValueError: if a file is truncated or none of safetensors'.
    """
    sizes: Counter[str] = Counter()
    for path in shards:
        for info in read_header(path).values():
            if info.dtype in _DTYPES:
                sizes[_DTYPES[info.dtype]] += math.prod(info.shape)
    return max(sizes, key=sizes.__getitem__, default=None)


def refuse_foreign_heads(folder: Path) -> None:
    """Refuse a checkpoint whose policy needs a part that this package does not have; without it, it acts otherwise.

    Args:
        folder: a checkpoint folder.

    Raises:
        ValueError: if it has a file of such a part.
    """
    for kind, what in FOREIGN_HEADS.items():
        for path in sorted(folder.glob(f"{kind}--*_checkpoint.pt")):
            raise ValueError(
                f"{path} says that this checkpoint was trained with {what}, which this package does not have: take a "
                "checkpoint that was trained without it."
            )


def listed(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def head_step(path: Path) -> str:
    """``150000`` of ``action_head--150000_checkpoint.pt``."""
    return path.name.partition("--")[2].removesuffix("_checkpoint.pt")


def head_file(folder: Path, kind: str) -> Path | None:
    """The file of a head, that of the latest step if there are several.

    Args:
        folder: a checkpoint folder.
        kind: ``action_head`` or ``proprio_projector``.
    """
    files = sorted(
        (path for path in folder.glob(f"{kind}--*_checkpoint.pt") if path.is_file()),
        key=lambda path: int(head_step(path)) if head_step(path).isdigit() else float("inf"),
    )
    if len(files) > 1:
        _logger.warning("%s has %d files of %s; %s is loaded.", folder, len(files), kind, files[-1].name)
    return files[-1] if files else None
