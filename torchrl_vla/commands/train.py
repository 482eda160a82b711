"""`torchrl-vla train`: options from the configuration's fields, defaults from a preset or from the run to resume."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from torchrl_vla.commands.options import given_options
from torchrl_vla.config import TrainConfig
from torchrl_vla.config.presets import PRESETS, choose_preset
from torchrl_vla.envs.processes import check_temporary_folder, prepare_processes
from torchrl_vla.errors import UserError

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    prog = "torchrl-vla train"
    given = given_options(TrainConfig, arguments, prog=prog)
    run_dir = given.get("run_dir")
    if given.get("resume") and run_dir is not None:
        if given.get("preset") is not None:
            raise UserError("a resumed run keeps its own options: leave out --preset.")
        default, origin = TrainConfig.load(run_dir / "config.json"), f"those of the run in {run_dir}"
    else:
        preset = choose_preset(given.get("preset") or "auto")
        default, origin = PRESETS[preset](), f"preset {preset}: {PRESETS[preset].__doc__}"
    preset_name = default.preset
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        prog=prog,
        description="Fine-tune a policy with PPO/GRPO on LIBERO. "
        f"--preset {{auto,{','.join(PRESETS)}}} chooses the defaults; now {origin}",
        default=default,
        args=arguments,
    )
    config.preset = preset_name  # by its name, where auto has chosen it
    if config.ppo.num_envs > 1:
        prepare_processes()
    else:
        check_temporary_folder()  # videos are drawn in a process
    from torchrl_vla.recipes.grpo import train

    train(config)
