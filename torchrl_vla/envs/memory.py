"""How much memory environments need, and whether this machine has it."""

from __future__ import annotations

import os
from pathlib import Path

from torchrl_vla.errors import UserError

__all__ = ["available_memory", "check_memory", "count_models", "memory_needed", "models_that_fit"]

# Resident memory, measured with OSMesa as docs/history.md says; with EGL a part of it is the GPU's.
#: A process with Python, PyTorch, TorchRL, MuJoCo and the compiled control loop.
_PROCESS = 0.45e9
#: A compiled model with its render context and assets: from 0.4 GB to 1.1 GB.
_MODEL = 1.1e9
#: One more environment of a model that is there already.
_ENVIRONMENT = 5e6
#: Suites whose tasks all compile to the same model.
_ONE_MODEL = ("libero_spatial", "libero_goal")


def count_models(task_suite: str, num_tasks: int) -> int:
    """How many compiled models so many tasks of a suite may take: at most one each."""
    return 1 if task_suite in _ONE_MODEL else num_tasks


def memory_needed(num_envs: int, workers: int, models: int) -> float:
    """Estimates the memory of environments in bytes.

    Args:
        num_envs: environments in all.
        workers: processes; 1 is this process.
        models: compiled models of the tasks; every environment runs one of them at a time.

    Examples:
        >>> f"{memory_needed(64, 16, models=1) / 1e9:.1f} GB"
        '25.1 GB'
    """
    processes = workers * _PROCESS if workers > 1 else 0.0
    return processes + workers * min(models, -(-num_envs // workers)) * _MODEL + num_envs * _ENVIRONMENT


def models_that_fit(num_envs: int, workers: int, models: int, memory: float) -> int:
    """How many compiled models each process may keep: those of its running episodes, and others as memory allows."""
    running = min(models, -(-num_envs // workers))
    spare = (memory - memory_needed(num_envs, workers, models)) / workers
    return min(models, running + max(0, int(spare / _MODEL)))


def check_memory(num_envs: int, workers: int, models: int, available: float) -> None:
    """Refuse environments that would not fit.

    Args:
        num_envs: as of :func:`memory_needed`.
        workers: likewise.
        models: likewise.
        available: bytes.

    Raises:
        ValueError: they need more; the message names the numbers, and the most environments or workers that fit.
    """
    needed = memory_needed(num_envs, workers, models)
    if needed <= available:
        return
    each = min(models, -(-num_envs // workers))
    fitting = [
        count for count in range(workers, num_envs, workers) if memory_needed(count, workers, models) <= available
    ]
    way_out = (
        f"At most {fitting[-1]} fit so: set num_envs={fitting[-1]}" if fitting else "Not even one per process fits"
    )
    fewer = [count for count in range(1, workers) if memory_needed(count, count, models) <= available]
    hint = f" (at most {fewer[-1]}, with one each)" if fewer and not fitting else ""
    raise UserError(
        f"{num_envs} environments in {workers} process(es) need some {needed / 1e9:.1f} GB of memory and "
        f"{available / 1e9:.1f} GB are available. Of each process, the libraries take {_PROCESS / 1e9:.2f} GB and "
        f"{each} compiled model(s) with their render contexts {_MODEL / 1e9:.1f} GB each; an environment takes "
        f"{_ENVIRONMENT / 1e6:.0f} MB. {way_out}, use fewer workers{hint}, run fewer tasks at a time, or free "
        "some memory."
    )


def available_memory() -> float:
    """Bytes that may still be used: what the system calls available, within the limits of a container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    groups = Path("/sys/fs/cgroup")
    for limit, usage, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most = (groups / limit).read_text().strip()
            used = float((groups / usage).read_text())
            lines = (groups / statistics).read_text().splitlines()
        except OSError:
            continue
        if most != "max":
            # Files' contents that are kept in memory go when they must.
            reclaimable = sum(float(line.split()[1]) for line in lines if line.split()[0] == cache)
            available = min(available, float(most) - used + reclaimable)
    return available
