"""How many processes simulate, and how many environments each of them holds."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from torchrl.envs import EnvBase, TransformedEnv

from torchrl_vla.envs.instruction import InstructionFromTaskId
from torchrl_vla.envs.libero import LiberoEnv
from torchrl_vla.envs.watchdog import WatchedParallelEnv

__all__ = ["choose_workers", "make_env"]

logger = logging.getLogger(__name__)

#: Resident memory of a process with one scene: libraries, model and render context.
_BYTES_PER_WORKER = 1.5 * 2**30


def choose_workers(num_envs: int, *, cores: int | None = None, memory: float | None = None) -> int:
    """Processes to simulate in: as many as cores and memory allow, each with the same number of environments.

    Args:
        num_envs: environments in all.
        cores: processor cores to use; None: those this process may use.
        memory: bytes to use; None: half of what the machine has.

    Examples:
        >>> choose_workers(8, cores=2, memory=24e9), choose_workers(6, cores=4, memory=24e9)
        (2, 3)
        >>> choose_workers(64, cores=16, memory=12e9)
        4
    """
    if cores is None:
        cores = len(os.sched_getaffinity(0))
    if memory is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    most = max(1, min(num_envs, cores, int(memory / _BYTES_PER_WORKER)))
    return max(workers for workers in range(1, most + 1) if num_envs % workers == 0)


def make_env(
    task_suite: str, *, num_envs: int = 1, workers: int | None = None, worker_timeout: float = 120.0, **options: Any
) -> EnvBase:
    """LIBERO in the layout that fits this machine: in this process, or spread over several.

    Args:
        task_suite: name of the suite.
        num_envs: environments in all.
        workers: processes; None: chosen by cores and memory. Must divide `num_envs`.
        worker_timeout: seconds after which a process that does not answer is replaced, see
            :class:`~torchrl_vla.envs.watchdog.WatchedParallelEnv`.
        options: further arguments of :class:`LiberoEnv`.

    Returns:
        An environment of batch size `[num_envs]` in one process, `[workers, num_envs / workers]` in several.

    Raises:
        ValueError: the number of workers does not divide the number of environments, or an option is not allowed.
    """
    workers = choose_workers(num_envs) if workers is None else workers
    if workers < 1 or num_envs % workers:
        raise ValueError(f"{num_envs} environments cannot be shared evenly by {workers} workers: choose a divisor.")
    logger.info("%d environments in %d process(es)", num_envs, workers)
    if workers == 1:
        return LiberoEnv(task_suite, num_envs=num_envs, **options)
    worker = functools.partial(
        LiberoEnv, task_suite, num_envs=num_envs // workers, include_instruction=False, **options
    )
    env = WatchedParallelEnv(workers, worker, mp_start_method="spawn", worker_timeout=worker_timeout)
    return TransformedEnv(env, InstructionFromTaskId(task_suite))
