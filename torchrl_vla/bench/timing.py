"""Measuring fairly: on one core, in turns, and memory in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

__all__ = ["in_fresh_process", "in_turns", "one_core", "resident_memory", "seconds_of"]

T = TypeVar("T")


def seconds_of(function: Callable[[], object]) -> float:
    """Wall-clock seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def in_turns(
    sides: Mapping[str, Callable[[], float]], rounds: int, tick: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Measures several things in turns, so that all meet the same noise.

    Args:
        sides: by name, what measures a thing once and returns the value. The first turn of each is not counted.
        rounds: values of each.
        tick: called after every round, the first one included.

    Returns:
        dict: `rounds` values by name.

    Examples:
        >>> in_turns({"ours": iter([9.0, 1.0, 2.0]).__next__}, rounds=2)
        {'ours': [1.0, 2.0]}
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, measure in sides.items():
            values[name].append(measure())
        tick()
    return {name: measured[1:] for name, measured in values.items()}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, and threads that start meanwhile (software renderers have some), on one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def resident_memory() -> int:
    """Bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a function of a module in a new process and return what it returns.

    Args:
        function: at the top level of its module.
        arguments: for it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
