"""`torchrl-vla finetune`: imitate demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from torchrl_vla.training.finetune_config import FinetuneConfig

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    config = tyro.cli(FinetuneConfig, prog="torchrl-vla finetune", args=arguments)
    from torchrl_vla.training.finetune import finetune

    finetune(config)
