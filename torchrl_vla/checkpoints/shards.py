"""The shards of a checkpoint folder and what their headers say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from torchrl_vla.errors import UserError
from torchrl_vla.files import read_json

__all__ = ["INDEX", "SINGLE", "Shards", "TensorInfo", "check_tensors", "listed", "read_shards", "stored_dtype"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

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


Shards = Mapping[Path, Mapping[str, TensorInfo]]
"""What each shard holds, by path."""


def read_shards(folder: Path) -> Shards:
    """Read what the shards of a folder hold, from the index and their headers alone, each of which is read once.

    Args:
        folder: a checkpoint folder.

    Raises:
        ValueError: there are no weights, a shard of the index is missing, or a file is damaged or of another kind.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise UserError(f"{folder} has neither {INDEX} nor {SINGLE}: it holds no weights.")
        return {folder / SINGLE: _read_header(folder / SINGLE)}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{folder / INDEX} has no weight_map, so it is no index of shards: download it again.")
    names_by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(
                f"{folder / INDEX} says that {name} is in {file!r}; only names of files beside the index are read. "
                "Download it again from a source that you trust."
            )
        names_by_file.setdefault(file, []).append(name)
    missing = [file for file in names_by_file if not (folder / file).exists()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: download the missing files.")
    shards: dict[Path, dict[str, TensorInfo]] = {}
    for file, names in names_by_file.items():
        header = _read_header(folder / file)
        absent = sorted(set(names) - set(header))
        if absent:
            raise UserError(f"{folder / file} lacks {listed(absent)}, which {INDEX} says it has: download it again.")
        shards[folder / file] = {name: header[name] for name in names}
    return shards


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {name: TensorInfo(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): download it again.") from error


def check_tensors(shards: Shards, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what is in the shards with what the model needs, before anything is loaded.

    Args:
        shards: from :func:`read_shards`.
        expected: shapes by upstream's name.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or stored in a dtype that weights do not have.
    """
    found = {name: info for header in shards.values() for name, info in header.items()}
    for path, header in shards.items():
        for name, info in header.items():
            if info.dtype not in _DTYPES:
                raise UserError(
                    f"{name} in {path} is stored as {info.dtype}; weights must be {', '.join(_DTYPES)}. Quantised ones "
                    "are not read: take the checkpoint that they were made from."
                )
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            raise UserError(
                f"{name} is {list(found[name].shape)} in the checkpoint, but its config.json makes it {list(shape)}: "
                "the configuration is of another model."
            )
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise UserError(f"the checkpoint lacks {listed(missing)}: its configuration is of another model.")
    if unknown:
        raise UserError(f"the checkpoint has {listed(unknown)}, which an OpenVLA has no place for.")


def stored_dtype(shards: Shards) -> str | None:
    """Tell the dtype of most weights, as ``config.json`` calls it.

    Args:
        shards: from :func:`read_shards`.

    Returns:
        ``float32``, ``bfloat16`` or ``float16``; None where no tensor is of one of these.
    """
    sizes: Counter[str] = Counter()
    for header in shards.values():
        for info in header.values():
            if info.dtype in _DTYPES:
                sizes[_DTYPES[info.dtype]] += math.prod(info.shape)
    return max(sizes, key=sizes.__getitem__, default=None)


def listed(names: list[str]) -> str:
    """List the first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
