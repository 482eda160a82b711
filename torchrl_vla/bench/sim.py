"""`torchrl-vla bench sim`: LIBERO here against stock LIBERO and against TorchRL's LiberoEnv, in one run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SimulatorBench"]

#: Least control steps per second of a host with a GPU, 16 processes and chunks of 8, by fidelity.
_WANTED_ON_GPU = {"exact": {16: 1600.0}, "fast": {16: 2500.0}}
#: Environments per process that are measured as rollouts step them.
_PER_WORKER = (1, 4)


@dataclass
class SimulatorBench:
    """Speed and memory of the simulator: ours and stock LIBERO in turns, medians of wall-clock times, ratios beside
    what is wanted. Needs some 4 GB of memory, and 1.3 GB per worker.

    Raises:
        ValueError: a value is out of range.
    """

    task_suite: str = "libero_spatial"
    """LIBERO suite, or one of LIBERO-PRO's."""
    task_ids: tuple[int, ...] = (0,)
    """Tasks: each is measured on one core; over several workers they run in turn."""
    rounds: int = 15
    """Values that a median is of (5 with --quick)."""
    stock_resets: int = 3
    """Resets of stock, some 8 s each (1 with --quick)."""
    workers: tuple[int, ...] | None = None
    """Numbers of processes with one environment each; None: 1, 2, 4, ... up to the number of cores."""
    envs: tuple[int, ...] | None = None
    """Numbers of environments in as many processes as there are cores; None: 1, 4, 16, 64."""
    torchrl: bool = True
    """Measure TorchRL's LiberoEnv too."""
    quick: bool = False
    """Fewer rounds, one core and all cores only, 8 environments."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        for name in ("rounds", "stock_resets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("task_ids", "workers", "envs"):
            values = getattr(self, name)
            least = 0 if name == "task_ids" else 1
            if values is not None and (not values or min(values) < least or len(set(values)) < len(values)):
                raise ValueError(f"{name} must be different numbers from {least} on, got {list(values)}.")
        cores = len(os.sched_getaffinity(0))
        if self.quick:
            self.rounds, self.stock_resets = min(self.rounds, 5), 1
            self.workers = self.workers or tuple(sorted({1, cores}))
            self.envs = self.envs or (8,)
        doubled = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
        self.workers = tuple(sorted(self.workers or {*doubled, cores}))
        self.envs = tuple(sorted(self.envs or (1, 4, 16, 64)))

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

        suite = get_suite(self.task_suite)
        for task_id in self.task_ids:
            suite.task(task_id)
        backend = configure_rendering()

        from torchrl_vla.bench import scaling, single_core
        from torchrl_vla.bench.measurements import Report

        assert self.workers is not None and self.envs is not None
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
            + 2 * (len(self.workers) + len(self.envs) + len(_PER_WORKER))
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
                    self.workers,
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
                    self.envs,
                    self.workers[-1],
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
                        per_worker * self.workers[-1],
                        self.workers[-1],
                        fidelity,
                        self.rounds,
                        wanted=None if on_cpu else _WANTED_ON_GPU[fidelity].get(self.workers[-1]),
                        tick=bar.update,
                    )
            if self.torchrl:
                report.section("against torchrl.envs.LiberoEnv", "ours", "TorchRL's")
                scaling.measure_against_torchrl(
                    report,
                    suite.name,
                    self.task_ids[0],
                    self.workers[-1],
                    self.torchrl_rounds,
                    targets=on_cpu,
                    tick=bar.update,
                )
        if self.json is not None:
            print(f"\nFigures: {self.json}")
