"""Which episodes to run: fixed before the first one starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from typing import NamedTuple, overload

import numpy as np


class Episode(NamedTuple):
    """One planned episode: its group, and where it starts."""

    group_id: int
    task_id: int
    init_state_id: int


class EpisodePlan(Sequence[Episode]):
    """The episodes of one update or evaluation: tasks x initial states x group members, in order.

    Args:
        starts: ``(task_id, init_state_id)`` of each group. A pair given twice makes two groups.
        group_size: episodes per group.
        first_group_id: the first group's id; the others count on from it.

    Examples:
        >>> EpisodePlan([(0, 3), (1, 3)], group_size=2)[2]
        Episode(group_id=1, task_id=1, init_state_id=3)
        >>> [(e.task_id, e.init_state_id) for e in EpisodePlan.grid([0, 1], range(2))]
        [(0, 0), (0, 1), (1, 0), (1, 1)]

    Raises:
        ValueError: if there is no group, or an id or size is out of range.
    """

    def __init__(self, starts: Iterable[tuple[int, int]], *, group_size: int = 1, first_group_id: int = 0) -> None:
        self._starts = [(int(task), int(state)) for task, state in starts]
        if not self._starts:
            raise ValueError("A plan needs at least one (task_id, init_state_id) to start from; got none.")
        if min(map(min, self._starts)) < 0:
            raise ValueError(f"Task and initial state ids must not be negative, got {min(self._starts)}.")
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1.")
        self.group_size = group_size
        self.first_group_id = first_group_id

    @classmethod
    def grid(cls, task_ids: Iterable[int], init_state_ids: Iterable[int], *, group_size: int = 1) -> EpisodePlan:
        """Every initial state of every task, such as an evaluation protocol asks for."""
        init_state_ids = list(init_state_ids)
        return cls(((task, state) for task in task_ids for state in init_state_ids), group_size=group_size)

    @classmethod
    def stream(
        cls,
        task_ids: Iterable[int],
        init_state_ids: Iterable[int],
        *,
        groups: int,
        group_size: int,
        seed: int,
        first_plan: int = 0,
    ) -> Iterator[EpisodePlan]:
        """Plans without end, one per update, in random order but even over tasks and initial states.

        Tasks take turns, in a new order each round; a task runs through all its initial states before one returns.

        Args:
            task_ids: distinct tasks.
            init_state_ids: distinct initial states, the same for every task.
            groups: groups per plan.
            group_size: episodes per group.
            seed: the same seed gives the same plans.
            first_plan: how many plans to pass over, to go on where an earlier run stopped.

        Raises:
            ValueError: if there is no task or initial state, one is given twice, or a size is not positive.
        """
        tasks, states = list(task_ids), list(init_state_ids)
        for name, ids in (("task_ids", tasks), ("init_state_ids", states)):
            if not ids or len(set(ids)) < len(ids):
                raise ValueError(f"{name}={ids} must be distinct and not empty.")
        if groups < 1:
            raise ValueError(f"groups={groups} must be at least 1.")
        starts = _shuffled_starts(tasks, states, np.random.default_rng(seed))

        def plans() -> Iterator[EpisodePlan]:
            first_group_id = first_plan * groups
            for chosen in iter(lambda: list(islice(starts, groups)), []):
                yield cls(chosen, group_size=group_size, first_group_id=first_group_id)
                first_group_id += groups

        next(islice(starts, first_plan * groups, first_plan * groups), None)
        return plans()

    def __len__(self) -> int:
        return len(self._starts) * self.group_size

    @overload
    def __getitem__(self, index: int) -> Episode: ...

    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...

    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        group = range(len(self))[index] // self.group_size
        return Episode(self.first_group_id + group, *self._starts[group])


def _shuffled_starts(tasks: list[int], states: list[int], rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    def without_repeats() -> Iterator[int]:
        for _ in cycle((None,)):
            yield from rng.permutation(states).tolist()

    next_state = {task: without_repeats() for task in tasks}
    for _ in cycle((None,)):
        for task in rng.permutation(tasks).tolist():
            yield task, next(next_state[task])
