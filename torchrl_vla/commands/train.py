"""`torchrl-vla train`: options from the configuration's fields, defaults from a preset or from the run to resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from torchrl_vla.commands.options import read_first
from torchrl_vla.config import TrainConfig
from torchrl_vla.config.presets import PRESETS, choose_preset
from torchrl_vla.envs.processes import prepare_processes

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    (wanted, run_dir), rest = read_first(arguments, "--preset", "--run-dir")
    preset = choose_preset(wanted or "auto")
    if "--resume" in rest and run_dir is not None:
        if not (Path(run_dir) / "config.json").is_file():
            raise ValueError(
                f"{run_dir} is not the folder of a run: it has no config.json. Leave out --resume to start one."
            )
        default, origin = TrainConfig.load(Path(run_dir) / "config.json"), f"those of the run in {run_dir}"
        from torchrl_vla.training.run_folder import noted_preset

        preset = noted_preset(Path(run_dir)) or preset
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
    if config.env.num_envs > 1:
        prepare_processes()
    from torchrl_vla.recipes.grpo import train

    train(config, preset)
