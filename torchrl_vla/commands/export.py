"""`torchrl-vla export`: a policy in upstream's format, or its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["ExportArguments", "main"]


@dataclass
class ExportArguments:
    """Write a policy in upstream's format, adapters merged, so that upstream's own code loads it; or its adapters."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder of a run (its newest checkpoint is taken), one of its checkpoints, or folder or hub id of a policy."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write. It appears when everything in it is written."""
    adapter: Path | None = None
    """Folder of a PEFT adapter to merge into a policy that has none."""
    adapter_only: bool = False
    """Write the adapters alone, in PEFT's format under upstream's names."""
    merge_dtype: Literal["float32", "weights"] = "float32"
    """float32: an adapter is added in float32 and rounded once; weights: rounded first and added in the weights' dtype,
    as PEFT's own merge does."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto: the checkpoint's."""
    overwrite: bool = False
    """Replace a checkpoint or adapter in the folder; a run is never replaced."""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    options = tyro.cli(ExportArguments, prog="torchrl-vla export", args=arguments)
    import torch

    from torchrl_vla.training.run_policy import export

    export(
        options.source,
        options.out,
        adapter=options.adapter,
        adapter_only=options.adapter_only,
        merge_dtype=options.merge_dtype,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        overwrite=options.overwrite,
    )
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{'Adapter' if options.adapter_only else 'Policy'}: {options.out} ({size / 1e6:,.1f} MB)")
