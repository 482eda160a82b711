"""How many processes simulate, and how many environments each of them holds."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from torchrl.envs import EnvBase, TransformedEnv

from torchrl_vla.envs.instruction import InstructionFromTaskId
from torchrl_vla.envs.libero import LiberoEnv
from torchrl_vla.envs.memory import available_memory, check_memory, count_models, memory_needed, models_that_fit
from torchrl_vla.envs.processes import prepare_processes
from torchrl_vla.envs.rendering import configure_rendering, egl_devices
from torchrl_vla.envs.watchdog import WatchedParallelEnv
from torchrl_vla.errors import UserError

__all__ = ["choose_workers", "make_env", "make_envs"]

logger = logging.getLogger(__name__)

#: More parts keep the workers busier, and make the policy's batches smaller.
_MOST_PARTS = 4


def choose_workers(num_envs: int, *, models: int = 1, cores: int | None = None, memory: float | None = None) -> int:
    """Choose how many processes simulate: as many as cores and memory allow, each with the same number of environments.

    Args:
        num_envs: environments in all.
        models: compiled models of their tasks.
        cores: processor cores to use; None: those this process may use.
        memory: bytes to use; None: half of what the machine has, or what is available if that is less. Building models
            for the first time takes more for a while.

    Examples:
        >>> choose_workers(8, cores=2, memory=24e9), choose_workers(6, cores=4, memory=24e9)
        (2, 3)
        >>> choose_workers(64, cores=16, memory=12e9), choose_workers(64, models=10, cores=16, memory=60e9)
        (4, 4)
    """
    if cores is None:
        cores = len(os.sched_getaffinity(0))
    if memory is None:
        memory = _memory_to_use()
    shares = (workers for workers in range(1, min(num_envs, cores) + 1) if num_envs % workers == 0)
    return max((workers for workers in shares if memory_needed(num_envs, workers, models) <= memory), default=1)


def _memory_to_use() -> float:
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2, available_memory())


def make_env(
    task_suite: str, *, num_envs: int = 1, workers: int | None = None, worker_timeout: float = 120.0, **options: Any
) -> EnvBase:
    """Return LIBERO in the layout that fits this machine: in this process, or spread over several.

    Args:
        task_suite: name of the suite.
        num_envs: environments in all.
        workers: processes; None: chosen by cores and memory. Must divide `num_envs`.
        worker_timeout: seconds after which a process that does not answer is replaced, see
            :class:`~torchrl_vla.envs.watchdog.WatchedParallelEnv`. What runs in this process is not watched.
        options: further arguments of :class:`LiberoEnv`.

    Returns:
        An environment of batch size `[num_envs]` in one process, `[workers, num_envs / workers]` in several.

    Raises:
        ValueError: the number of workers does not divide the number of environments, they need more memory than is
            available, or an option is not allowed.
    """
    workers, options = _checked(task_suite, num_envs, workers, options)
    if workers == 1:
        return LiberoEnv(task_suite, num_envs=num_envs, **options)
    env = _in_processes(task_suite, range(workers), workers, num_envs // workers, worker_timeout, options)
    return TransformedEnv(env, InstructionFromTaskId(task_suite))


def make_envs(
    task_suite: str, *, num_envs: int = 1, workers: int | None = None, worker_timeout: float = 120.0, **options: Any
) -> list[EnvBase]:
    """Return what :func:`make_env` makes, in up to four parts that take turns with the policy, and without strings.

    A GPU driver's EGL is known to hang, and what hangs in this process cannot be replaced: with EGL there is always a
    process that is watched, with OSMesa only where several are worth it.

    While a :class:`~torchrl_vla.collectors.GroupCollector` decides for one part, the others simulate. The policy is to
    read ``task_id`` (``instructions`` of :func:`~torchrl_vla.modules.make_actor`): strings cost more to pass around
    than a small network to run.

    Args:
        task_suite: as for :func:`make_env`.
        num_envs: likewise.
        workers: likewise.
        worker_timeout: likewise.
        options: likewise.

    Returns:
        One environment in this process, or several in processes of their own.

    Raises:
        ValueError: as for :func:`make_env`.
        RenderingUnavailable: there is no OpenGL to render with.
    """
    workers, options = _checked(task_suite, num_envs, workers, options)
    if workers == 1 and configure_rendering() != "egl":
        return [LiberoEnv(task_suite, num_envs=num_envs, include_instruction=False, **options)]
    parts = max(parts for parts in range(1, _MOST_PARTS + 1) if workers % parts == 0)
    numbers = [range(first, first + workers // parts) for first in range(0, workers, workers // parts)]
    return [_in_processes(task_suite, each, workers, num_envs // workers, worker_timeout, options) for each in numbers]


def _checked(
    task_suite: str, num_envs: int, workers: int | None, options: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Return the number of processes, and the options with the number of compiled models that each may keep."""
    if num_envs < 1:
        raise UserError(f"num_envs must be at least 1, got {num_envs}.")
    models = count_models(task_suite, len(options.get("task_ids") or (0,)))
    workers = choose_workers(num_envs, models=models) if workers is None else workers
    if workers < 1 or num_envs % workers:
        raise UserError(f"{num_envs} environments cannot be shared evenly by {workers} workers: choose a divisor.")
    check_memory(num_envs, workers, models, available_memory())
    kept = models_that_fit(num_envs, workers, models, _memory_to_use())
    gigabytes = memory_needed(num_envs, workers, models) / 1e9
    logger.info("%d environments in %d process(es), some %.1f GB of memory", num_envs, workers, gigabytes)
    return workers, {"max_models": kept, **options}


def _in_processes(
    task_suite: str, numbers: range, workers: int, per_worker: int, worker_timeout: float, options: dict[str, Any]
) -> EnvBase:
    """Workers, by their numbers among all; they draw on the GPUs in turns, as one GPU draws only so many pictures."""
    worker = functools.partial(LiberoEnv, task_suite, num_envs=per_worker, include_instruction=False, **options)
    gpus = egl_devices()
    variables = [{"MUJOCO_EGL_DEVICE_ID": str(gpus[number % len(gpus)])} for number in numbers] if gpus else None
    return WatchedParallelEnv(
        len(numbers),
        worker,
        create_env_kwargs=[{"shard": (number, workers)} for number in numbers],
        mp_start_method=prepare_processes(),
        worker_timeout=worker_timeout,
        worker_variables=variables,
    )
