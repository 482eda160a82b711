"""`torchrl-vla evaluate`: judge a policy by the standard protocol."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from torchrl_vla.config import EvaluateConfig
from torchrl_vla.envs.processes import check_temporary_folder, prepare_processes

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    config = tyro.cli(EvaluateConfig, prog="torchrl-vla evaluate", args=arguments)
    if config.num_envs > 1:
        prepare_processes()
    else:
        check_temporary_folder()  # videos are drawn in a process
    from torchrl_vla.recipes.evaluate import evaluate_checkpoint

    evaluate_checkpoint(config)
