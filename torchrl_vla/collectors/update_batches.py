"""Batches of at least so many control steps, in whole groups of complete episodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict

from torchrl_vla.collectors.group import GroupCollector
from torchrl_vla.collectors.plan import EpisodePlan

__all__ = ["UpdateCollector"]


class UpdateCollector:
    """Yields one batch per update: groups of complete episodes, at least `min_steps` control steps in all.

    How many groups that takes is guessed, before they run, from the episodes of the update before and with a tenth to
    spare; where the guess falls short, more groups follow. Every group is complete, so that no episode is in a batch
    because it ended first.

    Args:
        collector: runs the episodes.
        task_ids: distinct tasks, taken in turns.
        init_state_ids: distinct initial states of each task.

    Keyword Args:
        min_steps: least number of control steps per batch.
        group_size: episodes per group.
        horizon: control steps after which an episode is cut; the first guess of an episode's length.
        seed: the same seed gives the same episodes, in the same order.

    Examples:
        >>> batches = UpdateCollector(collector, [0, 1], range(50), min_steps=10_000, group_size=8, horizon=220,
        ...                           seed=0)  # doctest: +SKIP
        >>> for batch in batches:  # doctest: +SKIP
        ...     buffer.extend(batch)
    """

    def __init__(
        self,
        collector: GroupCollector,
        task_ids: Iterable[int],
        init_state_ids: Iterable[int],
        *,
        min_steps: int,
        group_size: int,
        horizon: int,
        seed: int,
    ) -> None:
        self.collector = collector
        self.task_ids, self.init_state_ids = list(task_ids), list(init_state_ids)
        self.min_steps, self.group_size, self.seed = min_steps, group_size, seed
        self.groups_done = 0
        self.mean_length = float(horizon)

    def state_dict(self) -> dict[str, Any]:
        """How many groups were run, and how long their episodes were."""
        return {"groups_done": self.groups_done, "mean_length": self.mean_length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the group after the last one."""
        self.groups_done, self.mean_length = int(state["groups_done"]), float(state["mean_length"])

    def __iter__(self) -> Iterator[TensorDict]:
        groups = EpisodePlan.stream(
            self.task_ids, self.init_state_ids, groups=1, group_size=1, seed=self.seed, first_plan=self.groups_done
        )
        while True:
            parts: list[TensorDict] = []
            steps = 0
            while steps < self.min_steps:
                # A second collection costs another wait for the last episodes: a few groups more are cheaper.
                count = math.ceil(1.1 * (self.min_steps - steps) / (self.group_size * self.mean_length))
                starts = [(group[0].task_id, group[0].init_state_id) for group in (next(groups) for _ in range(count))]
                plan = EpisodePlan(starts, group_size=self.group_size, first_group_id=self.groups_done)
                parts.append(self.collector.collect(plan))
                self.groups_done += count
                steps += int(parts[-1].get(("next", "num_control_steps")).sum())
            batch: TensorDict = torch.cat(parts) if len(parts) > 1 else parts[0]  # type: ignore[arg-type, assignment]
            self.mean_length = steps / int(batch.get(("next", "done")).sum())
            del parts
            yield batch
            # Images of hundreds of episodes: none are kept while the next are collected.
            del batch
