"""LIBERO's and LIBERO-PRO's task suites: tasks, instructions, initial states and horizons."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_vla.envs.installation import import_libero
from torchrl_vla.errors import UserError

__all__ = ["SUITES", "LiberoTask", "TaskSuite", "get_suite", "suite_names"]

#: LIBERO's own suites and the horizon of an episode in control steps, as OpenVLA's evaluation sets it.
SUITES = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}

_OTHER_HORIZON = 400


@dataclass(frozen=True)
class LiberoTask:
    """One task of a suite.

    Args:
        suite: name of the suite.
        task_id: index of the task in its suite.
        instruction: what the policy is told to do.
        bddl_file: the task's definition (scene and goal).
        init_states_file: the task's initial states, ``.npz`` or a torch pickle (``.pruned_init``).
    """

    suite: str
    task_id: int
    instruction: str
    bddl_file: Path
    init_states_file: Path

    @functools.cached_property
    def init_states(self) -> np.ndarray:
        """Flattened simulator states to start from, ``float64 [num_states, state_size]``, loaded when first read.

        Raises:
            ValueError: the file holds something else than a table of numbers.
        """
        loaded = _load_npz(self.init_states_file) if self.init_states_file.suffix == ".npz" else _load_pickle(self)
        states = np.array(loaded, dtype=np.float64)
        if states.ndim != 2 or not len(states):
            raise UserError(f"{self.init_states_file} must hold a table [num_states, state_size], got {states.shape}.")
        states.setflags(write=False)
        return states


@dataclass(frozen=True)
class TaskSuite:
    """A suite of tasks.

    Args:
        name: the suite's name, in lower case.
        tasks: its tasks, in the benchmark's default order.
        horizon: control steps after which an episode is truncated.
        base: LIBERO's suite that it is or is derived from, such as ``libero_goal`` of ``libero_goal_swap``, whose
            statistics policies have; None where there is none.
    """

    name: str
    tasks: tuple[LiberoTask, ...]
    horizon: int
    base: str | None = None

    def task(self, task_id: int) -> LiberoTask:
        """Return a task that can be run.

        Args:
            task_id: index of the task, ``0 <= task_id < len(tasks)``.

        Raises:
            ValueError: there is no such task, or this installation of LIBERO lacks its files.
        """
        if not 0 <= task_id < len(self.tasks):
            allowed = f"it must be in 0..{len(self.tasks) - 1}" if self.tasks else "the suite lists no task at all"
            raise UserError(f"task_id={task_id} is not a task of {self.name}: {allowed}.")
        task = self.tasks[task_id]
        for path in (task.bddl_file, task.init_states_file):
            if not path.is_file():
                raise UserError(
                    f"Task {task_id} of {self.name} cannot be run: LIBERO names {path} and this installation does not "
                    "have it. Generate the suite with LIBERO-PRO's own tools, or choose another suite."
                )
        return task


@functools.cache
def suite_names() -> tuple[str, ...]:
    """Names of all suites that the installed LIBERO registers, LIBERO-PRO's included."""
    return tuple(_benchmarks())


@functools.cache
def get_suite(name: str) -> TaskSuite:
    """Look a suite up by name.

    Args:
        name: a suite's name, such as ``"libero_spatial"`` or LIBERO-PRO's ``"libero_goal_swap"``; case does not matter.

    Returns:
        TaskSuite: its tasks. Their initial states are not loaded yet.

    Raises:
        ValueError: there is no such suite; the closest names are offered.

    Examples:
        >>> suite = get_suite("libero_spatial")
        >>> len(suite.tasks), suite.horizon, suite.task(0).init_states.shape[0]
        (10, 220, 50)
    """
    benchmarks = _benchmarks()
    key = name.lower()
    if key not in benchmarks:
        close = difflib.get_close_matches(key, benchmarks, n=4, cutoff=0.5) or list(SUITES)
        raise UserError(
            f"Unknown task suite {name!r}. Did you mean {', '.join(map(repr, close))}? "
            f"All {len(benchmarks)} names: torchrl_vla.envs.tasks.suite_names()."
        )
    base = _base_suite(key)
    with contextlib.redirect_stdout(io.StringIO()):
        libero = import_libero()
        entries = benchmarks[key]().tasks
        bddl_root, states_root = (_libero_folder(libero, name) for name in ("bddl_files", "init_states"))
    tasks = []
    for task_id, entry in enumerate(entries):
        base_bddl_file = bddl_root / base / entry.bddl_file if base else None
        bddl_file = (bddl_root / entry.problem_folder / entry.bddl_file).resolve()
        states_file = (states_root / entry.problem_folder / entry.init_states_file).resolve()
        converted = states_file.with_name(states_file.name + ".npz")
        tasks.append(
            LiberoTask(
                suite=key,
                task_id=task_id,
                instruction=_instruction(entry.language, bddl_file, base_bddl_file),
                bddl_file=bddl_file,
                init_states_file=states_file if states_file.is_file() else converted,
            )
        )
    return TaskSuite(key, tuple(tasks), SUITES[base] if base else _OTHER_HORIZON, base)


def _libero_folder(libero: Any, name: str) -> Path:
    """Return a folder of LIBERO's, as its `config.yaml` says, where there is one."""
    config = os.path.join(os.environ.get("LIBERO_CONFIG_PATH") or libero.libero_config_path, "config.yaml")
    advice = "mend it, remove it, or point LIBERO_CONFIG_PATH to another folder"
    try:
        folder = Path(libero.get_libero_path(name))
    except Exception as error:
        if not os.path.exists(config):
            raise
        raise UserError(f"{config} does not say where LIBERO's {name} are ({error}): {advice}.") from error
    if not folder.is_dir() and os.path.exists(config):
        raise UserError(f"{config} says that LIBERO's {name} are in {folder}, which is no folder: {advice}.")
    return folder


def _benchmarks() -> dict[str, type]:
    import_libero()
    from libero.libero import benchmark

    return benchmark.get_benchmark_dict()


def _base_suite(name: str) -> str | None:
    """Return the LIBERO suite that a suite is, or is derived from: ``libero_goal`` for ``libero_goal_with_mug``."""
    return next((base for base in SUITES if name == base or name.startswith(base + "_")), None)


def _instruction(language: str, bddl_file: Path, base_bddl_file: Path | None) -> str:
    """LIBERO's wording, taken from the file name, unless the task's definition was given another one.

    Published policies were trained on and judged with the file name's wording. LIBERO-PRO changes the text in the
    definition and keeps the file name, so there, and for suites of no LIBERO origin, the definition's text counts.
    """
    if not bddl_file.is_file():
        return language
    stated = _stated_language(bddl_file)
    if base_bddl_file is None:
        return stated or language
    original = _stated_language(base_bddl_file) if base_bddl_file.is_file() else None
    return language if stated is None or stated == original or original is None else stated


@functools.cache
def _stated_language(bddl_file: Path) -> str | None:
    match = re.search(r"\(:language\s+([^)]*)\)", bddl_file.read_text(encoding="utf-8"))
    return " ".join(match.group(1).split()) if match else None


def _load_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        return archive["states"]


def _load_pickle(task: LiberoTask) -> np.ndarray:
    """Read a file that upstream wrote with ``torch.save(array)``, allowing only what a NumPy array is made of."""
    import torch

    reconstruct = np.empty(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32))]
    allowed += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    with torch.serialization.safe_globals(allowed):
        return torch.load(task.init_states_file, weights_only=True, map_location="cpu")
