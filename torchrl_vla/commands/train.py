"""`torchrl-vla train`: options from the configuration's fields, defaults from a preset or from the run to resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from torchrl_vla.config import TrainConfig
from torchrl_vla.presets import PRESETS, choose_preset

__all__ = ["main"]


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


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
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
