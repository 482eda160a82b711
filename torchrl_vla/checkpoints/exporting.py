"""A policy for other tools: upstream's format with adapters merged, or the adapters alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from torchrl_vla.checkpoints.adapters import load_adapter, save_adapter
from torchrl_vla.checkpoints.architecture_file import CONFIG_FILE
from torchrl_vla.checkpoints.companions import copy_companions, write_preprocessor
from torchrl_vla.checkpoints.folder import open_checkpoint
from torchrl_vla.checkpoints.integrity import write_checksums
from torchrl_vla.checkpoints.locations import CHECKPOINTS, find_policy
from torchrl_vla.checkpoints.openvla_format import load_openvla, save_openvla
from torchrl_vla.errors import UserError
from torchrl_vla.files import read_json, whole_folder

__all__ = ["MergeDtype", "check_out", "export_checkpoint"]

MergeDtype = Literal["float32", "weights"]
"""``float32`` adds an adapter to its weight in float32 and rounds once; ``weights`` rounds the adapter's part to the
weight's dtype first, as peft does."""


def export_checkpoint(
    source: str,
    out: Path,
    *,
    adapter: Path | None = None,
    adapter_only: bool = False,
    merge_dtype: MergeDtype = "float32",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint in upstream's format, so that upstream's code loads it, or an adapter of it in peft's.

    Args:
        source: folder or hub id of a policy.
        out: folder to write; it appears once everything in it is written.
        adapter: folder of an adapter to add to the policy.
        adapter_only: write the adapter alone.
        merge_dtype: how the adapter is added.
        dtype: dtype of the shards; None for the checkpoint's.

    Raises:
        ValueError: `out` must not be written to, the source cannot be read, or it has no adapters.
    """
    folder = find_policy(source)
    if out.resolve() in folder.resolve().parents:
        raise UserError(f"{out} holds the policy that is exported: choose another folder.")
    if adapter_only and adapter is None:
        raise UserError(
            f"{source} is a policy with its adapters merged: export the adapters from the run's folder, whose "
            "checkpoints have them apart."
        )
    model = load_openvla(open_checkpoint(folder), dtype=dtype or "stored")
    if adapter is not None:
        load_adapter(model, adapter)
    with whole_folder(out) as partial:
        if adapter_only:
            save_adapter(model, partial, base_model=source)
        else:
            save_openvla(model, partial, dtype=dtype, merge_in_float32=merge_dtype == "float32")
            copy_companions(folder, partial)
            write_preprocessor(model.config, partial)
            write_checksums(partial)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse to write over what was not made by an export.

    Args:
        out: folder to write.
        overwrite: whether a checkpoint or adapter in it is replaced; the folder of a run never is.

    Raises:
        ValueError: it must not be written to.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{out} exists already: choose another folder, or pass --overwrite to replace it.")
    config = read_json(out / CONFIG_FILE) if (out / CONFIG_FILE).is_file() else {}
    # Days of work: runs have a config.json too, that of their options.
    if any(out.rglob(CHECKPOINTS)) or "ppo" in config:
        raise UserError(f"{out} is the folder of a run, or holds one, and is not replaced: choose another folder.")
    # A fine-tuning without a checkpoint so far: its config.json has options too, and no model_type.
    adapter = not config and (out / "adapter_config.json").is_file()
    if config.get("model_type") != "openvla" and not adapter:
        raise UserError(f"{out} is neither a checkpoint nor an adapter, and is not replaced: choose another folder.")
