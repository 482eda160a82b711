"""The `torchrl-vla` command. Its options are the fields of `torchrl_vla.config`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from torchrl_vla.config import TrainConfig
from torchrl_vla.presets import PRESETS, choose_preset

__all__ = ["main"]

_USAGE = """usage: torchrl-vla COMMAND [OPTIONS]        (torchrl-vla COMMAND --help shows the options)

  train      fine-tune a policy with PPO/GRPO on LIBERO
  evaluate   judge a policy by the standard protocol
"""


def _split_preset(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Take --preset out of the arguments: it chooses the other options' defaults, so it is read before them."""
    rest, preset, arguments = [], "auto", list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if argument == "--preset":
            if not arguments:
                raise ValueError(f"--preset needs a name: auto, {', '.join(PRESETS)}.")
            preset = arguments.pop(0)
        elif argument.startswith("--preset="):
            preset = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    return preset, rest


def _train(arguments: Sequence[str]) -> None:
    preset, rest = _split_preset(arguments)
    name = choose_preset(preset)
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        prog="torchrl-vla train",
        description="Fine-tune a policy with PPO/GRPO on LIBERO. "
        f"--preset {{auto,{','.join(PRESETS)}}} chooses the defaults below (now {name}: {PRESETS[name].__doc__})",
        default=PRESETS[name](),
        args=rest,
    )
    from torchrl_vla.training.run import train

    train(config, preset=name)


@dataclass
class EvaluateArguments:
    """What to evaluate."""

    checkpoint: Annotated[str, tyro.conf.arg(aliases=["--pretrained-checkpoint"])]
    """Folder or hub id of the policy; a run folder means its newest checkpoint."""


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": _train}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: command and options; None: those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return
    command = _COMMANDS.get(arguments[0])
    if command is None:
        sys.exit(f"torchrl-vla: no command {arguments[0]!r}: choose {', '.join(_COMMANDS)}.")
    try:
        command(arguments[1:])
    except ValueError as error:
        # What a user typed wrong deserves a sentence, not a traceback.
        sys.exit(f"torchrl-vla {arguments[0]}: {error}")
