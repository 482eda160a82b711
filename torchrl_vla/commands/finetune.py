"""`torchrl-vla finetune`: imitate demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tyro

from torchrl_vla.commands.options import read_first
from torchrl_vla.config.finetune import FinetuneConfig

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    (out,), rest = read_first(arguments, "--out")
    program = "torchrl-vla finetune"
    if "--resume" in rest and out is not None:
        # What is not said anew stays as it was.
        before = replace(FinetuneConfig.load(Path(out) / "config.json"), out=Path(out))
        config = tyro.cli(FinetuneConfig, prog=program, default=before, args=rest)
    else:
        config = tyro.cli(FinetuneConfig, prog=program, args=arguments)
    from torchrl_vla.recipes.finetune import finetune

    finetune(config)
