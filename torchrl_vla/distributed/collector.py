"""Whole groups of episodes, each run by one of several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensordict import TensorDict

from torchrl_vla.collectors import Episode, GroupCollector
from torchrl_vla.distributed.ranks import OneProcess

__all__ = ["SharedCollector"]


class SharedCollector(GroupCollector):
    """A :class:`~torchrl_vla.collectors.GroupCollector` for each of several processes, which run one plan together.

    Every process takes its share of each plan and yields what it collected, with the episodes numbered as one process
    would have numbered them. Whatever makes a batch's size counts the control steps of all processes, so that they
    plan alike; and as an episode owns its random numbers, the episodes are those of one process.

    Args:
        env: as for :class:`~torchrl_vla.collectors.GroupCollector`, and so is the rest.
        ranks: the processes; with one it is that collector.
    """

    def __init__(self, env: Any, policy: Any, plans: Any = (), *, ranks: OneProcess, **options: Any) -> None:
        super().__init__(env, policy, plans, **options)
        self.ranks = ranks
        self._plan: Sequence[Episode] = ()
        self._nothing: TensorDict | None = None

    def collect(
        self, plan: Sequence[Episode], *, number: int | None = None, stop: Callable[[], bool] | None = None
    ) -> TensorDict:
        """Run this process's share of a plan.

        Raises:
            BaseException: what ended a process's rollout is raised in it, and :class:`SystemExit` in the others, so
                that none waits for it.
        """
        mine, number = self.ranks.share(plan), self._collections if number is None else number
        self._plan, first, failure, batch = plan, self._episodes, None, None
        try:
            batch = super().collect(mine, number=number, stop=stop) if mine else None
        except BaseException as error:
            failure = error
        codes = self.ranks.gather(None if failure is None else getattr(failure, "code", 1))
        if failure is not None:
            raise failure
        if any(code is not None for code in codes):
            raise SystemExit(next(code for code in codes if code is not None))
        if batch is not None:
            local = batch["collector", "traj_ids"] - first
            batch["collector", "traj_ids"] = first + self.ranks.rank + self.ranks.size * local
            self._nothing = batch[:0]
        else:
            self._count(plan)
        if len(plan) < self.ranks.size:  # some have nothing, and learn from the others what it looks like
            looks = self.ranks.gather(self._nothing)
            batch = batch if batch is not None else next(look for look in looks if look is not None)
        assert batch is not None
        return batch

    def _count(self, plan: Sequence[Episode]) -> None:
        super()._count(self._plan)  # of which this process ran a share

    def _control_steps(self, batch: TensorDict) -> int:
        return self.ranks.sum(super()._control_steps(batch))
