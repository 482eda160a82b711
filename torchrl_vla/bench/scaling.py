"""Control steps per second of whole environments: over workers, over environments, and against TorchRL's LiberoEnv."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from torchrl.envs import EnvBase, MultiAction, ParallelEnv, TransformedEnv

from torchrl_vla.bench.measurements import Figure, Report
from torchrl_vla.bench.single_core import CHUNK
from torchrl_vla.bench.timing import in_turns
from torchrl_vla.envs import get_suite
from torchrl_vla.envs.factory import make_env, make_envs
from torchrl_vla.envs.installation import import_libero

__all__ = ["measure_against_torchrl", "measure_envs", "measure_parts", "measure_workers"]

#: No episode is cut while its speed is measured.
_NO_HORIZON = 10**9
#: How many times as fast as TorchRL's, on a CPU.
_WANTED_RATIOS = {"exact": 8.0, "fast": 18.0}


def measure_workers(
    report: Report,
    suite: str,
    task_ids: Sequence[int],
    workers: Sequence[int],
    fidelity: str,
    rounds: int,
    *,
    wanted: dict[int, float],
    tick: Callable,
) -> None:
    """One environment per process, over several numbers of processes.

    Args:
        report: gets the figures; the ratio is to perfect scaling from the smallest number.
        suite: name of the suite.
        task_ids: tasks, taken in turn.
        workers: numbers of processes.
        fidelity: ``"exact"`` or ``"fast"``.
        rounds: decisions.
        wanted: least control steps per second, by number of workers.
        tick: called after every number.
    """
    rates: dict[int, float] = {}
    for count in workers:
        rates[count] = _rate_of_ours(suite, task_ids, count, count, fidelity, rounds)
        perfect = rates[workers[0]] / workers[0] * count
        report.add(
            Figure(
                f"{fidelity}, {count} worker(s) of one environment",
                "steps/s",
                rates[count],
                perfect if count > workers[0] else None,
                more_is_better=True,
                wanted=wanted.get(count),
            )
        )
        tick()


def measure_envs(
    report: Report,
    suite: str,
    task_ids: Sequence[int],
    num_envs: Sequence[int],
    workers: int,
    fidelity: str,
    rounds: int,
    *,
    tick: Callable,
) -> None:
    """Several numbers of environments in at most `workers` processes; otherwise as `measure_workers`."""
    for count in num_envs:
        processes = max(number for number in range(1, min(workers, count) + 1) if count % number == 0)
        rate = _rate_of_ours(suite, task_ids, count, processes, fidelity, rounds)
        report.add(
            Figure(f"{fidelity}, {count} environment(s) in {processes} worker(s)", "steps/s", rate, more_is_better=True)
        )
        tick()


def measure_parts(
    report: Report,
    suite: str,
    task_ids: Sequence[int],
    num_envs: int,
    workers: int,
    fidelity: str,
    rounds: int,
    *,
    wanted: float | None,
    tick: Callable,
) -> None:
    """Environments in parts, each stepped by a thread as soon as it is ready, as rollouts step them.

    What `measure_workers` measures waits for the slowest of all at every decision, and for the main process between
    decisions. Here a part waits for its own slowest only.

    Args:
        report: gets the figure: all control steps over the time from the first decision to the last.
        suite: name of the suite.
        task_ids: tasks, taken in turn.
        num_envs: environments in all.
        workers: processes in all.
        fidelity: ``"exact"`` or ``"fast"``.
        rounds: decisions of every environment, or fewer where each takes long.
        wanted: least control steps per second.
        tick: called at the end.
    """
    rounds = max(3, rounds * workers // num_envs)
    envs = make_envs(suite, num_envs=num_envs, workers=workers, **_options(task_ids, fidelity))
    with contextlib.ExitStack() as stack:
        for env in envs:
            stack.enter_context(contextlib.closing(env))
        with ThreadPoolExecutor(len(envs)) as pool:
            decisions = list(pool.map(_decisions, envs))

            def run(count: int) -> int:
                return sum(pool.map(lambda decide: sum(decide() for _ in range(count)), decisions))

            run(1)
            began = time.perf_counter()
            steps = run(rounds)
            seconds = time.perf_counter() - began
    name = f"{fidelity}, {num_envs} environment(s) in {workers} worker(s) in {len(envs)} part(s)"
    report.add(Figure(name, "steps/s", steps / seconds, more_is_better=True, wanted=wanted))
    tick()


def measure_against_torchrl(
    report: Report, suite: str, task_id: int, workers: int, rounds: int, *, targets: bool, tick: Callable
) -> None:
    """TorchRL's `LiberoEnv` in a `ParallelEnv` and ours, in turns, with as many workers and the same chunks.

    Args:
        report: gets the figures.
        suite: name of the suite.
        task_id: the task.
        workers: processes of each side.
        rounds: decisions of each side.
        targets: whether to print what is wanted, which holds for rendering on the CPU.
        tick: called after every round.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        began = time.perf_counter()
        theirs = stack.enter_context(contextlib.closing(_torchrl_env(suite, task_id, workers, Path(folder))))
        constructed = time.perf_counter()
        theirs.reset()
        reset = time.perf_counter()
        sides = {"theirs": _rates(theirs)}
        for fidelity in _WANTED_RATIOS:
            env = _our_env(suite, [task_id], workers, workers, fidelity)
            sides[fidelity] = _rates(stack.enter_context(contextlib.closing(env)))
        found = in_turns(sides, rounds, tick)
    for fidelity, wanted in _WANTED_RATIOS.items():
        report.add(
            Figure.of_rounds(
                f"{fidelity}, {workers} worker(s)",
                "steps/s",
                found[fidelity],
                found["theirs"],
                more_is_better=True,
                wanted_ratio=wanted if targets else None,
            )
        )
    report.add(Figure("torchrl.envs.LiberoEnv: construction", "s", constructed - began))
    report.add(Figure("torchrl.envs.LiberoEnv: reset", "s", reset - constructed))


def _rate_of_ours(
    suite: str, task_ids: Sequence[int], num_envs: int, workers: int, fidelity: str, rounds: int
) -> float:
    """Control steps per second, the median of decisions; fewer of them where each takes long."""
    with contextlib.closing(_our_env(suite, task_ids, num_envs, workers, fidelity)) as env:
        rates = in_turns({"ours": _rates(env)}, max(3, rounds * workers // num_envs))["ours"]
    return statistics.median(rates)


def _our_env(suite: str, task_ids: Sequence[int], num_envs: int, workers: int, fidelity: str) -> EnvBase:
    return make_env(suite, num_envs=num_envs, workers=workers, **_options(task_ids, fidelity))


def _options(task_ids: Sequence[int], fidelity: str) -> dict[str, Any]:
    return {"task_ids": list(task_ids), "fidelity": fidelity, "max_episode_steps": _NO_HORIZON}


def _torchrl_env(suite: str, task_id: int, workers: int, folder: Path) -> EnvBase:
    """TorchRL's environments, with LIBERO's settings in a folder for them."""
    # They write settings where there are none: into the user's home, and without LIBERO-PRO's assets.
    places = ("benchmark_root", "bddl_files", "init_states", "datasets", "assets")
    paths = {name: str(import_libero().get_libero_path(name)) for name in places}
    (folder / "config.yaml").write_text(yaml.safe_dump(paths))
    worker = functools.partial(_torchrl_worker, suite, task_id, str(folder))
    return ParallelEnv(workers, worker, mp_start_method="spawn", metadata_from_workers=True)


def _rates(env: EnvBase) -> Callable[[], float]:
    """Start episodes; what is returned runs their next decision and gives the control steps per second."""
    decide = _decisions(env)

    def decision() -> float:
        began = time.perf_counter()
        return decide() / (time.perf_counter() - began)

    return decision


def _decisions(env: EnvBase) -> Callable[[], int]:
    """Start episodes; what is returned runs their next decision, of random actions, and gives the control steps."""
    state = env.reset()
    generator = torch.Generator().manual_seed(0)
    shape = (*env.batch_size, CHUNK, 7)

    def decide() -> int:
        nonlocal state
        state.set("action", torch.rand(shape, generator=generator) * 2 - 1)
        state = env.step(state)["next"].exclude("reward")
        return int(state.get("num_control_steps", torch.tensor(env.batch_size.numel() * CHUNK)).sum())

    return decide


def _torchrl_worker(suite: str, task_id: int, settings: str) -> EnvBase:
    """TorchRL's environment with chunks of actions, given the initial states that it cannot read from LIBERO-PRO."""
    os.environ["LIBERO_CONFIG_PATH"] = settings
    import_libero()
    from torchrl.envs import LiberoEnv

    env = LiberoEnv(
        suite,
        task_id,
        init_states=get_suite(suite).task(task_id).init_states,
        init_state_mode="cycle",
        max_episode_steps=_NO_HORIZON,
        env_kwargs={"ignore_done": True},
    )
    return TransformedEnv(env, MultiAction(stack_rewards=False))
