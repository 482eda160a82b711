"""Which task and which initial state an episode runs when the caller does not say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from torchrl_vla.envs.tasks import TaskSuite
from torchrl_vla.errors import UserError

__all__ = ["INIT_STATE_MODES", "EpisodeSchedule"]

INIT_STATE_MODES = ("cycle", "random", "fixed")


class EpisodeSchedule:
    """Takes the tasks in turn, and each task's initial states in turn, at random, or always the same one.

    Args:
        suite: the suite.
        task_ids: the tasks to run in turn.
        init_state_mode: ``"cycle"``, ``"random"`` or ``"fixed"``.
        init_state_id: the initial state that a cycle starts with, or the fixed one.
        seed: seed of the random choices.
        shard: number of this schedule among so many that share the episodes: the second of four takes every fourth
            one, from the second on.

    Raises:
        ValueError: a task or an initial state does not exist, a task is named twice, or the mode or shard is unknown.

    Examples:
        >>> from torchrl_vla.envs import get_suite
        >>> second = EpisodeSchedule(get_suite("libero_spatial"), [3, 5, 7], shard=(1, 2))
        >>> [second.next() for _ in range(4)]  # of (3, 0), (5, 0), (7, 0), (3, 1), (5, 1), (7, 1), (3, 2), (5, 2)
        [(5, 0), (3, 1), (7, 1), (5, 2)]
    """

    def __init__(
        self,
        suite: TaskSuite,
        task_ids: Sequence[int],
        *,
        init_state_mode: str = "cycle",
        init_state_id: int = 0,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if not task_ids:
            raise UserError("task_ids is empty: name at least one task.")
        if len(set(task_ids)) != len(task_ids):
            raise UserError(f"task_ids={list(task_ids)} names a task twice: list each task once.")
        if init_state_mode not in INIT_STATE_MODES:
            raise UserError(f"init_state_mode must be one of {', '.join(INIT_STATE_MODES)}, got {init_state_mode!r}.")
        if not 0 <= shard[0] < shard[1]:
            raise UserError(f"shard must be (number, of how many), numbered from 0, got {shard}.")
        self._suite = suite
        self._number, self._shards = shard
        self._task_ids = tuple(task_ids)
        self._mode = init_state_mode
        self._first_state = init_state_id
        for task_id in self._task_ids:
            self.check(task_id, init_state_id)
        self.set_seed(seed)

    def set_seed(self, seed: int | None) -> None:
        """Start over: the first task, the first initial state, and a fresh random generator."""
        # One seed for all shards must not make them choose the same.
        self._generator = np.random.default_rng(seed)
        if seed is not None and self._shards > 1:
            self._generator = np.random.default_rng([seed, self._number])
        self._tasks_taken = 0
        self._states_taken: Counter[int] = Counter()

    def next(self, task_id: int | None = None, init_state_id: int | None = None) -> tuple[int, int]:
        """Chooses what the caller leaves open, and moves on by what was chosen.

        Args:
            task_id: the task, if the caller wants a certain one.
            init_state_id: the initial state, likewise.

        Returns:
            tuple: task and initial state.

        Raises:
            ValueError: the task or the initial state does not exist.
        """
        if task_id is None:
            episode = self._number + self._tasks_taken * self._shards
            task_id = self._task_ids[episode % len(self._task_ids)]
            self._tasks_taken += 1
        if init_state_id is None:
            count = len(self._suite.task(task_id).init_states)
            if self._mode == "random":
                init_state_id = int(self._generator.integers(count))
            else:
                taken = self._nth_state(task_id) if self._mode == "cycle" else 0
                init_state_id = (self._first_state + taken) % count
                self._states_taken[task_id] += 1
        self.check(task_id, init_state_id)
        return task_id, init_state_id

    def _nth_state(self, task_id: int) -> int:
        """How many initial states of the task come before the next one of this shard."""
        tasks, visits = len(self._task_ids), self._states_taken[task_id]
        turns = range(self._number, self._number + tasks * self._shards, self._shards)
        own = [episode for episode in turns if self._task_ids[episode % tasks] == task_id]
        if not own:  # asked for by the caller alone
            return self._number + visits * self._shards
        return own[0] // tasks + visits * (self._shards // math.gcd(self._shards, tasks))

    def check(self, task_id: int, init_state_id: int) -> None:
        """Refuse a task or an initial state that does not exist.

        Raises:
            ValueError: the suite has no such task, or the task no such initial state.
        """
        count = len(self._suite.task(task_id).init_states)
        if not 0 <= init_state_id < count:
            raise UserError(
                f"init_state_id={init_state_id} is not an initial state of task {task_id} of {self._suite.name}: "
                f"it must be in 0..{count - 1}."
            )
