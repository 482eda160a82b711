"""TorchRL's side of a collector of planned episodes: batches, their size, and where the plans stand."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NoReturn

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import BaseCollector

from torchrl_vla.collectors.plan import Episode
from torchrl_vla.errors import UserError

__all__ = ["PlannedCollector"]

#: Names in a state, and what they are here.
_STATE = {
    "frames": "_frames",
    "batches": "_iter",
    "collections": "_collections",
    "episodes": "_episodes",
    "plans": "_plans_taken",
    "mean_control_steps": "_mean_steps",
    "seed": "seed",
}


class PlannedCollector(BaseCollector):
    """Yields batches of whole plans, and can go on where it stopped; how a plan is run is a subclass's :meth:`collect`.

    Args:
        plans: the plans, in order; each is run once.

    Keyword Args:
        min_control_steps: fewest control steps of a batch; None: one plan per batch.
        total_frames: decisions after which iterating stops; -1 for as long as there are plans.
        seed: of the episodes' random numbers, not negative; None draws one from torch's global generator.
        pre_collect_hook: called before each batch that iterating yields.
        post_collect_hook: called with each batch that iterating yields.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        plans: Iterable[Sequence[Episode]],
        *,
        min_control_steps: int | None = None,
        total_frames: int = -1,
        seed: int | None = None,
        pre_collect_hook: Callable[[], None] | None = None,
        post_collect_hook: Callable[[TensorDictBase], None] | None = None,
    ) -> None:
        super().__init__(pre_collect_hook=pre_collect_hook, post_collect_hook=post_collect_hook)
        if min_control_steps is not None and min_control_steps < 1:
            raise UserError(f"min_control_steps={min_control_steps} must be at least 1; None takes plan by plan.")
        if seed is not None and seed < 0:
            raise UserError(f"seed={seed} must not be negative; None draws one.")
        self.min_control_steps = min_control_steps
        self.total_frames = total_frames
        self.seed = int(torch.randint(1 << 62, ())) if seed is None else seed
        self._plans = iter(plans)
        self._taken: list[Sequence[Episode]] = []
        # Named as stats() of TorchRL's collectors reads them.
        self._frames, self._iter = 0, -1
        self._collections = self._episodes = self._plans_taken = 0
        self._mean_steps = 0.0

    @abstractmethod
    def collect(self, plan: Sequence[Episode], *, number: int | None = None) -> TensorDict:
        """Run the episodes of a plan, and return their decisions ``[T]``."""

    def __len__(self) -> NoReturn:
        raise TypeError("A GroupCollector has no length: how many batches its frames make shows as episodes end.")

    def iterator(self) -> Iterator[TensorDict]:
        """Collect one batch after the other, until plans or frames end."""
        while self.total_frames < 0 or self._frames < self.total_frames:
            if self.pre_collect_hook is not None:
                self.pre_collect_hook()
            before, self._taken = self.state_dict(), []
            try:
                batch = self._next_batch()
            except BaseException:
                # Of a batch that nobody has seen, no plan counts as taken: the next iteration runs them again.
                self._plans = chain(self._taken, self._plans)
                self._set_state(before)
                raise
            if batch is None:
                return
            self._iter += 1
            self._frames += len(batch)
            if self.post_collect_hook is not None:
                self.post_collect_hook(batch)
            yield batch
            # Images of hundreds of episodes: none are kept while the next are collected.
            del batch

    def state_dict(self) -> OrderedDict[str, Any]:
        """Return how far the plans have come; the policy's weights are not in it."""
        return OrderedDict((name, getattr(self, attribute)) for name, attribute in _STATE.items())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the plan after the last one that was collected when the state was taken.

        Raises:
            ValueError: if this collector has gone further already.
        """
        ahead = state_dict["plans"] - self._plans_taken
        if ahead < 0:
            raise UserError(
                f"The state was taken after {state_dict['plans']} plans, and this collector has taken "
                f"{self._plans_taken}: load it into a new one."
            )
        self._set_state(state_dict)
        next(islice(self._plans, ahead, ahead), None)

    def _set_state(self, state_dict: Mapping[str, Any]) -> None:
        for name, attribute in _STATE.items():
            setattr(self, attribute, state_dict[name])

    def _count(self, plan: Sequence[Episode]) -> None:
        """Take note of a plan that was run."""
        self._collections += 1
        self._episodes += len(plan)

    def _next_batch(self) -> TensorDict | None:
        """Return the next plans' decisions; None if there are none."""
        parts: list[TensorDict] = []
        steps = episodes = 0
        missing = self.min_control_steps or 0
        while steps < missing or not parts:
            plan = self._next_plan(missing - steps)
            if not plan:
                break
            parts.append(self.collect(plan))
            steps += self._control_steps(parts[-1])
            episodes += len(plan)
        if not parts:
            return None
        batch: TensorDict = torch.cat(parts) if len(parts) > 1 else parts[0]
        self._mean_steps = steps / episodes
        return batch

    def _control_steps(self, batch: TensorDict) -> int:
        """Return what counts towards the size of a batch."""
        counts = batch.get(("next", "num_control_steps"), None)
        return len(batch) if counts is None else int(counts.sum())

    def _next_plan(self, missing_steps: int) -> list[Episode]:
        """Return the next plan, or as many as are likely to have so many steps; empty if there are none."""
        # A second collection costs another wait for the last episodes: a few groups more are cheaper.
        wanted = math.ceil(1.1 * missing_steps / self._mean_steps) if self._mean_steps else 1
        episodes: list[Episode] = []
        while len(episodes) < max(wanted, 1):
            plan = next(self._plans, None)
            if plan is None:
                break
            self._plans_taken += 1
            self._taken.append(plan)
            episodes += plan
        return episodes
