"""Control steps per second of whole environments: over workers, over environments, and against TorchRL's LiberoEnv."""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from torchrl.envs import EnvBase, MultiAction, ParallelEnv, TransformedEnv

from torchrl_vla.bench.report import Figure, Report
from torchrl_vla.bench.single_core import CHUNK
from torchrl_vla.envs import get_suite
from torchrl_vla.envs.installation import import_libero
from torchrl_vla.envs.layout import make_env

__all__ = ["measure_against_torchrl", "measure_envs", "measure_workers"]

#: No episode is cut while its speed is measured.
_NO_HORIZON = 10**9


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
) -> dict[int, float]:
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

    Returns:
        dict: control steps per second by number of workers.
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
    return rates


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


def measure_against_torchrl(
    report: Report,
    suite: str,
    task_id: int,
    workers: int,
    rounds: int,
    *,
    ours: dict[str, float],
    targets: bool,
    tick: Callable,
) -> None:
    """TorchRL's `LiberoEnv` in a `ParallelEnv` with as many workers and the same chunks as ours had.

    Args:
        report: gets the figures.
        suite: name of the suite.
        task_id: the task.
        workers: processes.
        rounds: decisions.
        ours: control steps per second by fidelity, measured with as many workers.
        targets: whether to print what is wanted, which holds for rendering on the CPU.
        tick: called at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        # TorchRL's LiberoEnv writes LIBERO's settings where there are none: into the user's home, and without
        # LIBERO-PRO's assets.
        places = ("benchmark_root", "bddl_files", "init_states", "datasets", "assets")
        paths = {name: str(import_libero().get_libero_path(name)) for name in places}
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(paths))
        worker = functools.partial(_torchrl_worker, suite, task_id, folder)
        began = time.perf_counter()
        env = ParallelEnv(workers, worker, mp_start_method="spawn", metadata_from_workers=True)
        try:
            constructed = time.perf_counter()
            tensordict = env.reset()
            reset = time.perf_counter()
            actions = _random_actions((rounds + 1, workers, CHUNK, 7))
            seconds = []
            for action in actions:
                start = time.perf_counter()
                tensordict = env.step(tensordict.set("action", action))["next"].exclude("reward")
                seconds.append(time.perf_counter() - start)
        finally:
            env.close()
    theirs = workers * CHUNK / statistics.median(seconds[1:])
    for fidelity, wanted in (("exact", 8.0), ("fast", 18.0)):
        report.add(
            Figure(
                f"{fidelity}, {workers} worker(s), against torchrl.envs.LiberoEnv",
                "steps/s",
                ours[fidelity],
                theirs,
                more_is_better=True,
                wanted_ratio=wanted if targets else None,
            )
        )
    report.add(Figure("torchrl.envs.LiberoEnv: construction", "s", constructed - began))
    report.add(Figure("torchrl.envs.LiberoEnv: reset", "s", reset - constructed))
    tick()


def _rate_of_ours(
    suite: str, task_ids: Sequence[int], num_envs: int, workers: int, fidelity: str, rounds: int
) -> float:
    """Control steps per second, the median of so many decisions after a first one that is not counted."""
    env = make_env(
        suite,
        num_envs=num_envs,
        workers=workers,
        task_ids=list(task_ids),
        fidelity=fidelity,
        max_episode_steps=_NO_HORIZON,
    )
    try:
        tensordict = env.reset()
        rates = []
        for action in _random_actions((rounds + 1, *env.action_spec.shape)):
            start = time.perf_counter()
            tensordict = env.step(tensordict.set("action", action))["next"].exclude("reward")
            seconds = time.perf_counter() - start
            rates.append(int(tensordict["num_control_steps"].sum()) / seconds)
    finally:
        env.close()
    return statistics.median(rates[1:])


def _random_actions(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


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
