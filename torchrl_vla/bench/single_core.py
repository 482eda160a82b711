"""Our simulator and stock LIBERO in turns, in one process on one core."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torchrl_vla.bench.measurements import Figure, Report
from torchrl_vla.bench.timing import in_fresh_process, in_turns, one_core, resident_memory, seconds_of
from torchrl_vla.envs import LiberoEnv
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.envs.simulation.stock import StockSimulator

__all__ = ["CHUNK", "measure_decisions", "measure_memory", "measure_overhead", "measure_physics", "measure_resets"]

#: Control steps of one decision.
CHUNK = 8

#: Both cameras are what stock renders by default, at every control step.
_STOCK_CAMERAS = ("agentview", "robot0_eye_in_hand")
_FIDELITIES = ("exact", "fast")
#: Our known resets take microseconds: so many make one value.
_KNOWN_RESETS = 100
#: Environments that are added to the first one, to see what one more takes.
_FURTHER = 16


def measure_decisions(
    report: Report, stock: StockSimulator, suite: str, task_id: int, rounds: int, *, targets: bool, tick: Callable
) -> None:
    """One decision end to end: a chunk of random actions, and one agentview picture of 256 pixels.

    Args:
        report: gets the figures.
        stock: renders both cameras at every control step, as LIBERO does by default.
        suite: name of the suite.
        task_id: the task.
        rounds: decisions of each side.
        targets: whether to print what is wanted, which holds for rendering on the CPU.
        tick: called after every round.
    """
    simulators = {name: LiberoSimulator(suite, fidelity=name) for name in _FIDELITIES}
    try:
        with one_core():
            sides = {
                name: _chunks(simulator, task_id, picture=True)
                for name, simulator in (("stock", stock), *simulators.items())
            }
            found = in_turns(sides, rounds, tick)
    finally:
        for simulator in simulators.values():
            simulator.close()
    for name, wanted in zip(_FIDELITIES, (12.0, 25.0), strict=True):
        report.add(
            Figure.of_rounds(
                f"{name}: 8 actions and one picture, task {task_id}",
                "ms",
                found[name],
                found["stock"],
                wanted_ratio=wanted if targets else None,
            )
        )


def measure_physics(report: Report, suite: str, task_id: int, rounds: int, *, tick: Callable) -> None:
    """Measure a chunk of random actions without pictures, stock's cameras off; arguments as of `measure_decisions`."""
    simulators: dict[str, Any] = {"stock": StockSimulator(suite, cameras=())}
    simulators |= {name: LiberoSimulator(suite, fidelity=name) for name in _FIDELITIES}
    try:
        with one_core():
            sides = {name: _chunks(simulator, task_id, picture=False) for name, simulator in simulators.items()}
            found = in_turns(sides, rounds, tick)
    finally:
        for simulator in simulators.values():
            simulator.close()
    for name, wanted in zip(_FIDELITIES, (2.5, 4.5), strict=True):
        figure = Figure.of_rounds(
            f"{name}: 8 actions, no cameras, task {task_id}", "ms", found[name], found["stock"], wanted_ratio=wanted
        )
        report.add(figure)


def measure_resets(
    report: Report, stock: StockSimulator, suite: str, task_id: int, rounds: int, *, tick: Callable
) -> None:
    """Measure a reset to an initial state that was settled before; stock resets, sets the state and settles."""
    ours = LiberoSimulator(suite)
    try:
        with one_core():

            def known() -> float:
                ours.reset(0, task_id, 0)
                began = time.perf_counter()
                for _ in range(_KNOWN_RESETS):
                    ours.reset(0, task_id, 0)
                return (time.perf_counter() - began) / _KNOWN_RESETS * 1e3

            found = in_turns(
                {"ours": known, "stock": lambda: seconds_of(lambda: stock.reset(0, task_id, 0)) * 1e3}, rounds, tick
            )
    finally:
        ours.close()
    name = f"reset to a known initial state, task {task_id}"
    report.add(Figure.of_rounds(name, "ms", found["ours"], found["stock"], wanted_ratio=1000.0))


def measure_overhead(report: Report, suite: str, task_id: int, rounds: int, *, tick: Callable) -> None:
    """Measure what `LiberoEnv.step` takes beside the simulator's calls in it, per decision, in percent of these."""
    envs = {name: LiberoEnv(suite, task_id, fidelity=name, max_episode_steps=10**9) for name in _FIDELITIES}
    try:
        with one_core():
            found = in_turns({name: _overheads(env) for name, env in envs.items()}, rounds, tick)
    finally:
        for env in envs.values():
            env.close()
    for name, percents in found.items():
        report.add(Figure(f"{name}: LiberoEnv over its simulator", "%", statistics.median(percents), wanted=3.0))


def measure_memory(report: Report, suite: str, task_id: int, *, tick: Callable) -> None:
    """Resident memory of a process with one environment and of each further one, each side in a process of its own."""
    first, further = in_fresh_process(_memory_of_ours, suite, task_id)
    tick()
    first_stock, further_stock = in_fresh_process(_memory_of_stock, suite, task_id)
    tick()
    report.add(Figure("memory of a process with one environment", "MB", first, first_stock))
    report.add(Figure("memory of each further environment", "MB", further, further_stock, wanted=30.0))


def _overheads(env: LiberoEnv) -> Callable[[], float]:
    """Start an episode; what is returned runs its next decision and gives the environment's own share of it."""
    state = env.reset()
    clock = env._simulator = _Clock(env._simulator)
    state.set("action", torch.rand(env.action_spec.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)

    def decision() -> float:
        before = clock.seconds
        total = seconds_of(lambda: env.step(state))
        inside = clock.seconds - before
        return 100 * (total - inside) / inside

    return decision


class _Clock:
    """A simulator that adds up the time spent in it."""

    def __init__(self, simulator: Any) -> None:
        self._simulator = simulator
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._simulator, name)

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = method(*arguments)
            self.seconds += time.perf_counter() - began
            return result

        return timed


def _chunks(simulator: Any, task_id: int, *, picture: bool) -> Callable[[], float]:
    """Start an episode; what is returned runs its next decision and gives the milliseconds that it took."""
    generator = np.random.default_rng(0)
    simulator.reset(0, task_id, 0)

    def decision() -> float:
        actions = generator.uniform(-1, 1, (CHUNK, 7))
        began = time.perf_counter()
        steps, success = simulator.step(0, actions)
        if picture:
            simulator.render(0, "agentview")
        milliseconds = (time.perf_counter() - began) * 1e3
        if success:
            simulator.reset(0, task_id, 0)
        return milliseconds * CHUNK / steps

    return decision


def stock_with_both_cameras(suite: str) -> StockSimulator:
    """Stock LIBERO as users have it: both cameras at every control step."""
    return StockSimulator(suite, cameras=_STOCK_CAMERAS)


def _memory_of_ours(suite: str, task_id: int) -> tuple[float, float]:
    return _memory(LiberoSimulator(suite, num_slots=1 + _FURTHER), task_id, _FURTHER)


def _memory_of_stock(suite: str, task_id: int) -> tuple[float, float]:
    return _memory(StockSimulator(suite, num_slots=2, cameras=_STOCK_CAMERAS), task_id, 1)


def _memory(simulator: Any, task_id: int, further: int) -> tuple[float, float]:
    """Megabytes of this process with one running episode, and what each of `further` more added."""
    used = []
    for slot in range(1 + further):
        simulator.reset(slot, task_id, slot)
        simulator.step(slot, np.zeros((1, 7)))
        simulator.render(slot, "agentview")
        used.append(resident_memory() / 1e6)
    simulator.close()
    return used[0], (used[-1] - used[0]) / further
