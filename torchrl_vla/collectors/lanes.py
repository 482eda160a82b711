"""Several environments that take turns with the policy: what each is busy with, and which episodes come next."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vla.collectors.plan import Episode
from torchrl_vla.collectors.slots import EnvSlots

__all__ = ["Decision", "Lane", "Outcome", "Waiting", "make_executor"]


class Decision(NamedTuple):
    """What the policy saw in some slots, int64 ``[n]``, and what it wrote."""

    slots: Tensor
    seen: TensorDict
    written: dict[NestedKey, Tensor]


class Outcome(NamedTuple):
    """What came of a turn: of the decision, if there was one, and of the episodes that were to start.

    Args:
        following: what followed from the decision, ``[n, ...]``.
        lost: bool ``[n]``, slots whose worker was replaced meanwhile.
        cut: what the truncated ones of them show, in the order of their slots; None if there are none, or nobody asked.
        renewed: slots where reserved episodes started after others had ended.
    """

    following: dict[NestedKey, Tensor]
    lost: Tensor
    cut: TensorDict | None
    renewed: Tensor


class Lane:
    """An environment's share of a collection.

    A turn is one job for the environment: it steps the slots that run, then starts episodes in those that were free and
    in those whose episode has ended with this step. Were these starts a turn of their own, all other slots would stand
    still until everyone else had had theirs.

    Args:
        slots: the environment's.
    """

    def __init__(self, slots: EnvSlots) -> None:
        self.slots = slots
        #: The episode that each slot runs, int64 ``[size]``, -1 for none.
        self.current = torch.full((len(slots),), -1)
        #: Slots whose episode has to start again. It does so there and not elsewhere: if an episode is what ends its
        #: worker each time, that soon shows.
        self.again = torch.zeros(0, dtype=torch.int64)
        self.decision: Decision | None = None
        #: Episodes to start where others end during the turn.
        self.reserved: list[int] = []
        self._job: Future[Outcome | None] | None = None

    def free(self) -> Tensor:
        """Return the slots without an episode, int64 ``[n]``, workers in turns."""
        return self.slots.in_turns[self.current[self.slots.in_turns] < 0]

    def running(self) -> Tensor:
        """Return the slots in the middle of an episode, int64 ``[n]``."""
        mask = self.current >= 0
        mask[self.again] = False
        return mask.nonzero().squeeze(-1)

    def send(
        self, executor: Executor, plan: Sequence[Episode], decision: Decision | None, starts: list[int], keep_cut: bool
    ) -> None:
        """Begin a turn; :meth:`wait` gives what came of it.

        Args:
            executor: runs it.
            plan: all episodes.
            decision: for the slots that run; None if there are none.
            starts: episodes for slots that are free now, at most as many as there are.
            keep_cut: whether the last observations of truncated episodes are wanted.
        """
        free = self.free()[: len(starts)]
        self.current[free] = torch.tensor(starts, dtype=torch.int64)
        ready, self.again = torch.cat([self.again, free]), self.again[:0]
        self.decision = decision
        episodes = [plan[index] for index in (*self.current[ready].tolist(), *self.reserved)]
        self._job = executor.submit(_take_turn, self.slots, decision, ready, episodes, keep_cut)

    def wait(self) -> Outcome | None:
        """Wait for the end of the turn; None if no slot was running."""
        job, self._job = self._job, None
        return None if job is None else job.result()


def _take_turn(
    slots: EnvSlots, decision: Decision | None, ready: Tensor, episodes: Sequence[Episode], keep_cut: bool
) -> Outcome | None:
    if decision is None:
        slots.start(ready, episodes)
        return None
    running = decision.slots
    following = slots.step(running, decision.written)
    lost = slots.lost()[running]
    over = following["done"].reshape(-1).cpu() & ~lost
    truncated = running[over & ~following["terminated"].reshape(-1).cpu()]
    cut = slots.observe(truncated) if keep_cut and len(truncated) else None
    ended = slots.in_turns[torch.isin(slots.in_turns, running[over])]
    renewed = ended[: len(episodes) - len(ready)]
    beginning = torch.cat([ready, renewed])
    if len(beginning):
        slots.start(beginning, episodes[: len(beginning)])
    return Outcome(following, lost, cut, renewed)


class Waiting:
    """The episodes that no slot has begun yet.

    Args:
        num_episodes: how many there are.
        lanes: what is to run them.
    """

    def __init__(self, num_episodes: int, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes
        self._queue = list(range(num_episodes))  # a heap: those that are put back keep their place

    def take(self, lane: Lane) -> list[int]:
        """Episodes for a lane's free slots; more are :attr:`~Lane.reserved` for slots that become free in its turn.

        Free slots come first, wherever they are. Both kinds are shared out evenly, so that the last episodes are spread
        over environments.
        """
        free = sum(len(each.free()) for each in self._lanes)
        mine = len(lane.free())
        starts = self._pop(min(mine, _share(len(self._queue), mine, free)))
        running = sum(len(each.running()) for each in self._lanes)
        left = len(self._queue) + sum(len(each.reserved) for each in self._lanes) - (free - mine)
        mine = len(lane.running())
        lane.reserved = self._pop(min(mine, _share(left, mine, running)))
        return starts

    def put_back(self, episodes: Sequence[int]) -> None:
        """Take episodes back."""
        for episode in episodes:
            heapq.heappush(self._queue, episode)

    def _pop(self, count: int) -> list[int]:
        return [heapq.heappop(self._queue) for _ in range(min(count, len(self._queue)))]


def _share(total: int, mine: int, everyone: int) -> int:
    return math.ceil(max(0, total) * mine / max(1, everyone))


class _Inline(Executor):
    """Runs a job at once, in this thread, to which OpenGL contexts of an environment may belong."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        job: Future[Any] = Future()
        job.set_result(fn(*args, **kwargs))
        return job


def make_executor(lanes: int) -> Executor:
    """Return what runs the turns of so many lanes."""
    return _Inline() if lanes == 1 else ThreadPoolExecutor(lanes, "environment")
