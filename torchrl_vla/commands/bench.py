"""`torchrl-vla bench`: measure speed and memory on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tyro

from torchrl_vla.bench.checkpoint_loading import CheckpointBench
from torchrl_vla.bench.gpu import GpuBench
from torchrl_vla.bench.sim import SimulatorBench
from torchrl_vla.files import check_output_file

__all__ = ["main"]

_BENCHES: dict[str, Callable[..., SimulatorBench | GpuBench | CheckpointBench]] = {
    "sim": SimulatorBench,
    "gpu": GpuBench,
    "checkpoint": CheckpointBench,
}


def main(arguments: Sequence[str]) -> None:
    """Run one measurement.

    Args:
        arguments: its name and options.
    """
    bench = tyro.extras.subcommand_cli_from_dict(
        _BENCHES, prog="torchrl-vla bench", description="Measure speed and memory on this machine.", args=arguments
    )
    if bench.json is not None:
        check_output_file(bench.json, "--json")
    bench.run()
