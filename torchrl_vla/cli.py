"""The `torchrl-vla` command. Its options are the fields of `torchrl_vla.config`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from torchrl_vla.config import TrainConfig
from torchrl_vla.presets import PRESETS, choose_preset

__all__ = ["main"]

_USAGE = """usage: torchrl-vla COMMAND [OPTIONS]        (torchrl-vla COMMAND --help shows the options)

  train      fine-tune a policy with PPO/GRPO on LIBERO
  evaluate   judge a policy by the standard protocol
"""


def _take(arguments: list[str], option: str) -> str | None:
    """Take the value of an option out of the arguments."""
    for index, argument in enumerate(arguments):
        if argument == option:
            if index + 1 == len(arguments):
                raise ValueError(f"{option} needs a value.")
            del arguments[index]
            return arguments.pop(index)
        if argument.startswith(f"{option}="):
            return arguments.pop(index).split("=", 1)[1]
    return None


def _train(arguments: Sequence[str]) -> None:
    rest = list(arguments)
    # These choose the other options' defaults, so they are read before them.
    preset = choose_preset(_take(rest, "--preset") or "auto")
    run_dir = _take(rest, "--run-dir")
    if "--resume" in rest and run_dir is not None:
        if not (Path(run_dir) / "config.json").is_file():
            raise ValueError(
                f"{run_dir} is not the folder of a run: it has no config.json. Leave out --resume to start one."
            )
        default, origin = TrainConfig.load(Path(run_dir) / "config.json"), f"those of the run in {run_dir}"
    else:
        default, origin = PRESETS[preset](), f"preset {preset}: {PRESETS[preset].__doc__}"
    default.run_dir = Path(run_dir) if run_dir is not None else None
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        prog="torchrl-vla train",
        description="Fine-tune a policy with PPO/GRPO on LIBERO. "
        f"--preset {{auto,{','.join(PRESETS)}}} chooses the defaults; now {origin}",
        default=default,
        args=rest,
    )
    from torchrl_vla.training.run import train

    train(config, preset)


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
