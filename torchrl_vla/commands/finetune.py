"""`torchrl-vla finetune`: imitate demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from torchrl_vla.commands.options import take_option
from torchrl_vla.training.finetune_config import FinetuneConfig

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    rest = list(arguments)
    out = take_option(rest, "--out")
    default = None
    if "--resume" in rest and out is not None:
        # What is not said anew stays as it was.
        default = FinetuneConfig.load(Path(out) / "config.json")
        default.out = Path(out)
    elif out is not None:
        rest += ["--out", out]
    config = tyro.cli(FinetuneConfig, prog="torchrl-vla finetune", default=default, args=rest)
    from torchrl_vla.training.finetune import finetune

    finetune(config)
