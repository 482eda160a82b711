"""Which episodes to run: fixed before the first one starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, cycle, islice
from typing import NamedTuple, overload

import numpy as np

from torchrl_vla.errors import UserError

__all__ = ["Episode", "EpisodePlan"]


class Episode(NamedTuple):
    """One planned episode: its group, where it starts, and its number in the group."""

    group_id: int
    task_id: int
    init_state_id: int
    member: int = 0


class EpisodePlan(Sequence[Episode]):
    """The episodes of one update or evaluation: tasks x initial states x group members, in order.

    Args:
        starts: ``(task_id, init_state_id)`` of each group. A pair given twice makes two groups.
        group_size: episodes per group.
        first_group_id: the first group's id; the others count on from it.

    Examples:
        >>> EpisodePlan([(0, 3), (1, 3)], group_size=2)[2]
        Episode(group_id=1, task_id=1, init_state_id=3, member=0)
        >>> [(e.task_id, e.init_state_id) for e in EpisodePlan.grid([0, 1], range(2))]
        [(0, 0), (0, 1), (1, 0), (1, 1)]

    Raises:
        ValueError: if there is no group, or an id or size is out of range.
    """

    def __init__(self, starts: Iterable[tuple[int, int]], *, group_size: int = 1, first_group_id: int = 0) -> None:
        self._starts = [(int(task), int(state)) for task, state in starts]
        if not self._starts:
            raise UserError("A plan needs at least one (task_id, init_state_id) to start from; got none.")
        if min(map(min, self._starts)) < 0:
            raise UserError(f"Task and initial state ids must not be negative, got {min(self._starts)}.")
        if group_size < 1:
            raise UserError(f"group_size={group_size} must be at least 1.")
        self.group_size = group_size
        self.first_group_id = first_group_id

    @classmethod
    def grid(cls, task_ids: Iterable[int], init_state_ids: Iterable[int], *, group_size: int = 1) -> EpisodePlan:
        """Every initial state of every task, such as an evaluation protocol asks for."""
        init_state_ids = list(init_state_ids)
        return cls(((task, state) for task in task_ids for state in init_state_ids), group_size=group_size)

    @classmethod
    def stream(
        cls, init_states: Mapping[int, Iterable[int]], *, groups: int, group_size: int, seed: int
    ) -> Iterator[EpisodePlan]:
        """Make plans without end, in random order but even over tasks and over each task's initial states.

        Tasks take turns, in a new order each round; a task runs through all its initial states before one returns.
        Group ids count on from plan to plan, so that each names one group of the whole stream.

        Args:
            init_states: distinct initial states of each task; tasks may have unequal numbers of them.
            groups: groups per plan.
            group_size: episodes per group.
            seed: the same seed gives the same plans.

        Raises:
            ValueError: if there is no task, a task has no initial state or one twice, or a size is not positive.

        Examples:
            >>> plans = EpisodePlan.stream({0: range(50), 4: [7]}, groups=2, group_size=8, seed=0)
            >>> plan = next(plans)
            >>> len(plan), sorted({episode.task_id for episode in plan})
            (16, [0, 4])
        """
        states = {int(task): list(ids) for task, ids in init_states.items()}
        if not states:
            raise UserError("init_states is empty: name at least one task and its initial states.")
        for task, ids in states.items():
            if not ids or len(set(ids)) < len(ids):
                raise UserError(f"init_states of task {task} must be distinct and not empty, got {ids}.")
        if groups < 1:
            raise UserError(f"groups={groups} must be at least 1.")
        if group_size < 1:
            raise UserError(f"group_size={group_size} must be at least 1.")
        starts = _shuffled_starts(states, np.random.default_rng(seed))
        return (cls(islice(starts, groups), group_size=group_size, first_group_id=first) for first in count(0, groups))

    def __len__(self) -> int:
        return len(self._starts) * self.group_size

    @overload
    def __getitem__(self, index: int) -> Episode: ...

    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...

    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        group, member = divmod(range(len(self))[index], self.group_size)
        return Episode(self.first_group_id + group, *self._starts[group], member)


def _shuffled_starts(states: Mapping[int, list[int]], rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    def without_repeats(ids: list[int]) -> Iterator[int]:
        for _ in cycle((None,)):
            yield from rng.permutation(ids).tolist()

    next_state = {task: without_repeats(ids) for task, ids in states.items()}
    for _ in cycle((None,)):
        for task in rng.permutation(list(states)).tolist():
            yield task, next(next_state[task])
