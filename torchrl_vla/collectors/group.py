"""Collects exactly the planned episodes, each run to its end once, in whatever number of environments there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_vla.collectors.lanes import Decision, Lane, Outcome, Waiting, make_executor
from torchrl_vla.collectors.plan import Episode
from torchrl_vla.collectors.slots import EnvSlots
from torchrl_vla.collectors.trajectories import TrajectoryRecorder


class Progress(NamedTuple):
    """How far a collection has come; successes are counted where the environment reports ``success``."""

    decisions: int
    episodes: int
    successes: int
    planned_episodes: int


class GroupCollector:
    """Runs every episode of a plan to its end, exactly once, and yields whole plans.

    The set of episodes is fixed before they run, so that nothing is in a batch because it ended first (TorchRL's
    ``Collector(trajs_per_batch=...)`` fills its batches that way, which favours short episodes), and no episode
    straddles two weight updates. A slot whose episode is over takes the next one; once none is left, the policy sees
    only the slots still running, and only those are stepped. Where a worker of a
    :class:`~torchrl_vla.envs.watchdog.WatchedParallelEnv` had to be replaced, its episodes run again from their start
    and what was collected of them is dropped: the batch has every planned episode once, as if nothing had happened.

    A decision is stored once: what the policy saw and wrote, without ``not_stored``; under ``"next"`` only reward,
    done flags and ``next_keys``, and ``value_key`` if the policy writes it, as GAE needs it (after the last decision:
    0 if terminated, the value of what was seen then if truncated). The batch is flat, ``[T]``, ordered by episode and
    time, with ``group_id``, ``task_id``, ``init_state_id`` ``[T, 1]`` and ``("collector", "traj_ids")`` ``[T]``, on the
    CPU.

    Several environments take turns: while the policy decides for one of them, the others simulate, each in a thread of
    its own. Which one runs which episode does not depend on their speed.

    Args:
        env: any TorchRL environment, of any batch size (see :class:`EnvSlots`), whose reset reads ``task_id`` and
            ``init_state_id`` ``[*B, 1]`` and which reports them in its observations; or several, which must simulate
            in processes of their own (:func:`~torchrl_vla.envs.factory.make_envs`).
        policy: reads observations and writes an action; runs without gradients on the device of its parameters.
        plans: one per batch that iterating over the collector yields; :meth:`collect` needs none.

    Keyword Args:
        exploration_type: RANDOM to sample, DETERMINISTIC to judge the greedy policy.
        not_stored: entries the policy sees or writes that are left out.
        next_keys: entries of the next observation that are stored where they exist.
        value_key: where a policy with a critic writes its value ``[N, 1]``.
        progress: called after every step.

    Examples:
        >>> plans = EpisodePlan.stream([0], range(50), groups=4, group_size=8, seed=0)  # doctest: +SKIP
        >>> for batch in GroupCollector(LiberoEnv(num_envs=16), actor, plans):  # doctest: +SKIP
        ...     replay_buffer.extend(batch)

    Raises:
        ValueError: if the environment does not report ``task_id`` and ``init_state_id``.
    """

    #: Large, and the loss computes them anew.
    NOT_STORED: tuple[NestedKey, ...] = (("vla_action", "logits"), ("vla_action", "hidden"))

    def __init__(
        self,
        env: EnvBase | Sequence[EnvBase],
        policy: Callable[[TensorDictBase], TensorDictBase],
        plans: Iterable[Sequence[Episode]] = (),
        *,
        exploration_type: ExplorationType = ExplorationType.RANDOM,
        not_stored: Sequence[NestedKey] = NOT_STORED,
        next_keys: Sequence[NestedKey] = ("success", "num_control_steps"),
        value_key: NestedKey = "state_value",
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        envs = [env] if isinstance(env, EnvBase) else list(env)
        if not envs:
            raise ValueError("The collector needs at least one environment, got an empty list.")
        self.policy = policy
        self.plans = plans
        self.exploration_type = exploration_type
        self.value_key = value_key
        self.progress = progress
        self._slots = [EnvSlots(each) for each in envs]
        self._not_stored = frozenset(not_stored)
        self._next_keys = (*envs[0].reward_keys, *envs[0].done_keys, *next_keys)
        self._num_collected = 0

    @property
    def num_slots(self) -> int:
        """Episodes that can run at the same time."""
        return sum(map(len, self._slots))

    def __iter__(self) -> Iterator[TensorDict]:
        for plan in self.plans:
            yield self.collect(plan)

    @torch.no_grad()
    def collect(self, plan: Sequence[Episode]) -> TensorDict:
        """Run the episodes of a plan.

        Args:
            plan: at least one episode, such as an :class:`EpisodePlan`.

        Returns:
            Their decisions, ``[T]``, the episodes in the plan's order.

        Raises:
            ValueError: if the plan is empty.
            RuntimeError: if the environment starts another episode than it was asked to.
        """
        if not len(plan):
            raise ValueError("The plan has no episodes; it needs at least one.")
        collection = _Collection(plan, [Lane(slots) for slots in self._slots])
        with set_exploration_type(self.exploration_type), make_executor(len(self._slots)) as executor:
            # In turns and in a fixed order, so that the same seed gives the same batch whoever is faster.
            while collection.finished < len(plan):
                for lane in collection.lanes:
                    outcome = lane.wait()
                    if outcome is not None:
                        self._record(collection, lane, outcome)
                    self._send(collection, lane, executor)
        return self._label(collection)

    def _send(self, collection: _Collection, lane: Lane, executor: Executor) -> None:
        """Decides for the slots of an environment that run, and gives it its next turn."""
        running = lane.running()
        starts = collection.waiting.take(lane)
        decision = None
        if len(running):
            seen = lane.slots.observe(running)
            decision = Decision(running, seen, self._act(seen))
        if decision is not None or starts or len(lane.again):
            keep_cut = decision is not None and self.value_key in decision.written
            lane.send(executor, collection.plan, decision, starts, keep_cut)

    def _record(self, collection: _Collection, lane: Lane, outcome: Outcome) -> None:
        """Takes note of what followed from an environment's last decisions, and of the episodes begun since."""
        assert lane.decision is not None
        (slots, seen, written), lane.decision = lane.decision, None
        following, lost = outcome.following, outcome.lost
        current, recorder = lane.current, collection.recorder
        if lost.any():
            # Their worker was replaced. However far they had come, they run again from their start.
            recorder.discard(current[slots[lost]])
            lane.again = slots[lost]
            slots, seen = slots[~lost], seen[~lost]
            written = {key: value[~lost] for key, value in written.items()}
            following = {key: value[~lost] for key, value in following.items()}
        recorder.append(current[slots], self._decisions(seen, written, following))
        over = following["done"].reshape(-1).cpu()
        if outcome.cut is not None:
            cut = slots[over & ~following["terminated"].reshape(-1).cpu()]
            collection.last_values[current[cut]] = self._act(outcome.cut)[self.value_key].cpu()
        if "success" in following:
            collection.successes += int(following["success"].reshape(-1).cpu()[over].sum())
        collection.finished += int(over.sum())
        current[slots[over]] = -1
        begun, unused = lane.reserved[: len(outcome.renewed)], lane.reserved[len(outcome.renewed) :]
        current[outcome.renewed] = torch.tensor(begun, dtype=torch.int64)
        collection.waiting.put_back(unused)
        lane.reserved = []
        if self.progress is not None:
            decisions = int(recorder.lengths.sum())
            self.progress(Progress(decisions, collection.finished, collection.successes, len(collection.plan)))

    def _act(self, seen: TensorDict) -> dict[NestedKey, Tensor]:
        """What the policy writes, on its device, without what is not stored."""
        parameters = self.policy.parameters() if isinstance(self.policy, nn.Module) else ()
        device = next((parameter.device for parameter in parameters), seen.device)
        given = seen if device is None else seen.to(device)
        known = dict(given.items(True, True))
        answer = self.policy(given.clone(False))
        return {
            key: value
            for key, value in answer.items(True, True)
            if value is not known.get(key) and key not in self._not_stored
        }

    def _decisions(
        self, seen: TensorDict, written: dict[NestedKey, Tensor], following: dict[NestedKey, Tensor]
    ) -> TensorDict:
        for key, value in written.items():
            seen.set(key, value.cpu())
        for key in self._next_keys:
            if key in following:
                seen.set(_next(key), following[key])
        return seen.exclude(*self._not_stored).cpu()

    def _label(self, collection: _Collection) -> TensorDict:
        plan, lengths = collection.plan, collection.recorder.lengths
        data = collection.recorder.finish()
        for index, key in enumerate(Episode._fields):
            ids = torch.tensor([[episode[index]] for episode in plan])
            data.set(key, ids.repeat_interleave(lengths, 0))
        episodes = torch.arange(len(plan)) + self._num_collected
        self._num_collected += len(plan)
        data.set(("collector", "traj_ids"), episodes.repeat_interleave(lengths))
        if self.value_key in data.keys(True, True):
            following = data.get(self.value_key).roll(-1, 0)
            following[lengths.cumsum(0) - 1] = collection.last_values
            data.set(_next(self.value_key), following)
        return data


class _Collection:
    """How far the episodes of a plan have come, and what was recorded of them."""

    def __init__(self, plan: Sequence[Episode], lanes: Sequence[Lane]) -> None:
        self.plan = plan
        self.lanes = lanes
        self.waiting = Waiting(len(plan), lanes)
        self.recorder = TrajectoryRecorder(len(plan))
        self.last_values = torch.zeros(len(plan), 1)
        self.finished = self.successes = 0


def _next(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)
