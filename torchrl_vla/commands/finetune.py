"""`torchrl-vla finetune`: imitate demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tyro

from torchrl_vla.commands.options import given_options
from torchrl_vla.config import FinetuneConfig

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    prog = "torchrl-vla finetune"
    given = given_options(FinetuneConfig, arguments, prog=prog)
    if given.get("resume") and "run_dir" in given:
        # What is not said anew stays as it was.
        before = FinetuneConfig.load(given["run_dir"] / "config.json")
        config = tyro.cli(FinetuneConfig, prog=prog, default=replace(before, run_dir=given["run_dir"]), args=arguments)
    else:
        config = tyro.cli(FinetuneConfig, prog=prog, args=arguments)
    from torchrl_vla.recipes.finetune import finetune

    finetune(config)
