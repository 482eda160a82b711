"""`torchrl-vla bench sim`: LIBERO here against stock LIBERO and against TorchRL's LiberoEnv, in one run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torchrl_vla.config.ids import Ids
from torchrl_vla.config.validation import check_fields, check_ids, positive
from torchrl_vla.errors import UserError

__all__ = ["SimulatorBench"]

#: Least control steps per second of a host with a GPU, 16 processes and chunks of 8, by fidelity.
_WANTED_ON_GPU = {"exact": {16: 1600.0}, "fast": {16: 2500.0}}
#: Environments per process that are measured as rollouts step them.
_PER_WORKER = (1, 4)


@dataclass
class SimulatorBench:
    """Speed and memory of the simulator, ours and stock LIBERO in turns.

    Figures are medians of wall-clock times, ratios stand beside what is wanted. Needs some 4 GB of memory, and 1.3 GB
    per worker.

    Raises:
        ValueError: a value is out of range.
    """

    task_suite: str = "libero_spatial"
    """LIBERO suite, or one of LIBERO-PRO's."""
    task_ids: Ids = None
    """Tasks, such as 0 1 2 or 0-3; None: task 0. Each is measured on one core; over several workers they take turns."""
    rounds: int = 15
    """Values that a median is of (5 with --quick)."""
    stock_resets: int = 3
    """Resets of stock, some 8 s each (1 with --quick)."""
    num_workers: Ids = None
    """Numbers of processes with one environment each; None: 1, 2, 4, ... up to the number of cores."""
    num_envs: Ids = None
    """Numbers of environments in as many processes as there are cores; None: 1, 4, 16, 64."""
    torchrl: bool = True
    """Measure TorchRL's LiberoEnv too."""
    quick: bool = False
    """Fewer rounds, one core and all cores only, 8 environments."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self, "rounds", "stock_resets")
        check_ids(self, "task_ids", "num_workers", "num_envs")
        for name in ("num_workers", "num_envs"):
            if 0 in (getattr(self, name) or ()):
                raise UserError(f"{name} must be positive numbers, got {getattr(self, name)}.")
        cores = len(os.sched_getaffinity(0))
        if self.quick:
            self.rounds, self.stock_resets = min(self.rounds, 5), 1
            self.num_workers = self.num_workers or [1, cores]
            self.num_envs = self.num_envs or [8]
        doubled = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
        self.num_workers = sorted({*(self.num_workers or [*doubled, cores])})
        self.num_envs = sorted(self.num_envs or [1, 4, 16, 64])
        self.task_ids = self.task_ids or [0]

    @property
    def torchrl_rounds(self) -> int:
        """Decisions of TorchRL's environment, 2 s each on a CPU."""
        return min(self.rounds, 5)

    def run(self) -> None:
        """Measures and prints.

        Raises:
            ValueError: the suite or a task does not exist.
        """
        from tqdm import tqdm

        from torchrl_vla.envs import get_suite
        from torchrl_vla.envs.rendering import configure_rendering, renderer_name

        assert self.task_ids is not None and self.num_workers is not None and self.num_envs is not None
        suite = get_suite(self.task_suite)
        for task_id in self.task_ids:
            suite.task(task_id)
        backend = configure_rendering()

        from torchrl_vla.bench import scaling, single_core
        from torchrl_vla.bench.measurements import Report

        settings = {
            "renderer": f"{backend}, {renderer_name(backend)}",
            "suite": suite.name,
            "tasks": list(self.task_ids),
            "rounds": self.rounds,
        }
        report = Report("torchrl-vla bench sim", settings, self.json)
        on_cpu = backend == "osmesa"
        fidelities = ("exact", "fast")
        turns = 3 * (self.rounds + 1) + self.stock_resets + 1
        total = (
            len(self.task_ids) * turns
            + 2
            + 2 * (len(self.num_workers) + len(self.num_envs) + len(_PER_WORKER))
            + self.torchrl * (self.torchrl_rounds + 1)
        )
        with tqdm(total=total, desc="bench sim", unit="turn", leave=False) as bar:
            report.section("on one core", "ours", "stock")
            for task_id in self.task_ids:
                stock = single_core.stock_with_both_cameras(suite.name)
                try:
                    single_core.measure_decisions(
                        report, stock, suite.name, task_id, self.rounds, targets=on_cpu, tick=bar.update
                    )
                    single_core.measure_resets(report, stock, suite.name, task_id, self.stock_resets, tick=bar.update)
                finally:
                    stock.close()
                single_core.measure_physics(report, suite.name, task_id, self.rounds, tick=bar.update)
                single_core.measure_overhead(report, suite.name, task_id, self.rounds, tick=bar.update)
            single_core.measure_memory(report, suite.name, self.task_ids[0], tick=bar.update)
            report.section("LiberoEnv over workers", "ours", "perfect scaling")
            for fidelity in fidelities:
                scaling.measure_workers(
                    report,
                    suite.name,
                    self.task_ids,
                    self.num_workers,
                    fidelity,
                    self.rounds,
                    wanted={} if on_cpu else _WANTED_ON_GPU[fidelity],
                    tick=bar.update,
                )
            report.section("LiberoEnv over environments", "ours", "")
            for fidelity in fidelities:
                scaling.measure_envs(
                    report,
                    suite.name,
                    self.task_ids,
                    self.num_envs,
                    self.num_workers[-1],
                    fidelity,
                    self.rounds,
                    tick=bar.update,
                )
            report.section("LiberoEnv in parts, as rollouts step them", "ours", "")
            for fidelity in fidelities:
                for per_worker in _PER_WORKER:
                    scaling.measure_parts(
                        report,
                        suite.name,
                        self.task_ids,
                        per_worker * self.num_workers[-1],
                        self.num_workers[-1],
                        fidelity,
                        self.rounds,
                        wanted=None if on_cpu else _WANTED_ON_GPU[fidelity].get(self.num_workers[-1]),
                        tick=bar.update,
                    )
            if self.torchrl:
                report.section("against torchrl.envs.LiberoEnv", "ours", "TorchRL's")
                scaling.measure_against_torchrl(
                    report,
                    suite.name,
                    self.task_ids[0],
                    self.num_workers[-1],
                    self.torchrl_rounds,
                    targets=on_cpu,
                    tick=bar.update,
                )
        if self.json is not None:
            print(f"\nFigures: {self.json}")
