"""Collects exactly the planned episodes, each run to its end once, in whatever number of environments there is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

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

    Args:
        env: any TorchRL environment, of any batch size (see :class:`EnvSlots`), whose reset reads ``task_id`` and
            ``init_state_id`` ``[*B, 1]`` and which reports them in its observations.
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
        env: EnvBase,
        policy: Callable[[TensorDictBase], TensorDictBase],
        plans: Iterable[Sequence[Episode]] = (),
        *,
        exploration_type: ExplorationType = ExplorationType.RANDOM,
        not_stored: Sequence[NestedKey] = NOT_STORED,
        next_keys: Sequence[NestedKey] = ("success", "num_control_steps"),
        value_key: NestedKey = "state_value",
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.env = env
        self.policy = policy
        self.plans = plans
        self.exploration_type = exploration_type
        self.value_key = value_key
        self.progress = progress
        self._slots = EnvSlots(env)
        self._not_stored = frozenset(not_stored)
        self._next_keys = (*env.reward_keys, *env.done_keys, *next_keys)
        self._num_collected = 0

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
        recorder = TrajectoryRecorder(len(plan))
        last_values = torch.zeros(len(plan), 1)
        current = torch.full((len(self._slots),), -1)  # the episode each slot runs, -1 for none
        waiting = deque(range(len(plan)))
        finished = successes = 0
        with set_exploration_type(self.exploration_type):
            while finished < len(plan):
                free = (current < 0).nonzero().squeeze(-1)[: len(waiting)]
                if len(free):
                    current[free] = torch.tensor([waiting.popleft() for _ in free])
                    self._slots.start(free, [plan[episode] for episode in current[free].tolist()])
                slots = (current >= 0).nonzero().squeeze(-1)
                seen = self._slots.observe(slots)
                written = self._act(seen)
                following = self._slots.step(slots, written)
                lost = self._slots.lost()[slots]
                if lost.any():
                    # Their worker was replaced. However far they had come, they run again from their start.
                    recorder.discard(current[slots[lost]])
                    waiting.extendleft(current[slots[lost]].tolist())
                    current[slots[lost]] = -1
                    slots, seen = slots[~lost], seen[~lost]
                    written = {key: value[~lost] for key, value in written.items()}
                    following = {key: value[~lost] for key, value in following.items()}
                recorder.append(current[slots], self._decisions(seen, written, following))
                over = following["done"].reshape(-1).cpu()
                if self.value_key in written:
                    cut = slots[over & ~following["terminated"].reshape(-1).cpu()]
                    if len(cut):
                        last_values[current[cut]] = self._act(self._slots.observe(cut))[self.value_key].cpu()
                if "success" in following:
                    successes += int(following["success"].reshape(-1).cpu()[over].sum())
                finished += int(over.sum())
                current[slots[over]] = -1
                if self.progress is not None:
                    self.progress(Progress(int(recorder.lengths.sum()), finished, successes, len(plan)))
        return self._label(recorder, plan, last_values)

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

    def _label(self, recorder: TrajectoryRecorder, plan: Sequence[Episode], last_values: Tensor) -> TensorDict:
        lengths = recorder.lengths
        data = recorder.finish()
        for index, key in enumerate(Episode._fields):
            ids = torch.tensor([[episode[index]] for episode in plan])
            data.set(key, ids.repeat_interleave(lengths, 0))
        episodes = torch.arange(len(plan)) + self._num_collected
        self._num_collected += len(plan)
        data.set(("collector", "traj_ids"), episodes.repeat_interleave(lengths))
        if self.value_key in data.keys(True, True):
            following = data.get(self.value_key).roll(-1, 0)
            following[lengths.cumsum(0) - 1] = last_values
            data.set(_next(self.value_key), following)
        return data


def _next(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)
