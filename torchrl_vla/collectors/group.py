"""Collects exactly the planned episodes, each run to its end once, in whatever number of environments there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_vla.collectors.lanes import Decision, Lane, Outcome, Waiting, make_executor
from torchrl_vla.collectors.plan import Episode
from torchrl_vla.collectors.planned import PlannedCollector
from torchrl_vla.collectors.seeds import decision_seeds, episode_seeds
from torchrl_vla.collectors.slots import EnvSlots
from torchrl_vla.collectors.trajectories import TrajectoryRecorder
from torchrl_vla.errors import UserError
from torchrl_vla.modules.distributions import SEED_KEY

__all__ = ["GroupCollector", "Progress"]

#: Where a batch says which of its actions were executed.
MASK_KEY = "mask"
_LABELS = ("group_id", "task_id", "init_state_id")


class Progress(NamedTuple):
    """How far a collection has come; successes are counted where the environment reports ``success``."""

    decisions: int
    episodes: int
    successes: int
    planned_episodes: int


class GroupCollector(PlannedCollector):
    """Runs every episode of a plan to its end, exactly once, and yields whole plans.

    The set of episodes is fixed before they run, so that nothing is in a batch because it ended first (TorchRL's
    ``Collector(trajs_per_batch=...)`` fills its batches that way, which favours short episodes), and no episode
    straddles two weight updates. A slot whose episode is over takes the next one; once none is left, the policy sees
    only the slots still running, and only those are stepped. Where a worker of a
    :class:`~torchrl_vla.envs.watchdog.WatchedParallelEnv` had to be replaced, its episodes run again from their start
    and what was collected of them is dropped: the batch has every planned episode once, as if nothing had happened.

    An episode owns its random numbers. The policy finds a seed for each decision, ``"decision_seed"`` int64
    ``[N, 1]``, which depends on ``seed``, the number of the collection, the episode's group and member and the number
    of the decision: not on slots, workers or what else runs. :class:`~torchrl_vla.modules.TokenCategorical` samples
    with it; policies that do not know it draw from torch's global generator. It is not stored.

    A decision is stored once: what the policy saw and wrote, without ``not_stored``; under ``"next"`` only reward,
    done flags and ``next_keys``, and ``value_key`` if the policy writes it, as ``GAE(value_network=None)`` needs it.
    The batch is flat, ``[T]``, ordered by episode and time, with ``group_id``, ``task_id``, ``init_state_id``
    ``[T, 1]`` and ``("collector", "traj_ids")`` ``[T]``, on the CPU. Where the environment reports
    ``num_control_steps``, ``"mask"`` bool ``[T, K]`` says which actions of a chunk were executed before its episode
    ended. :class:`~torchrl_vla.objectives.AsymmetricClipPPOLoss` reads it; for TorchRL's losses with one
    log-probability per token or action, set ``loss.loss_mask_key = "mask"``.

    TorchRL counts frames; here they are decisions. A batch has as many as its episodes took, so there is no
    ``frames_per_batch``; ``min_control_steps`` sets its size instead. A later iteration goes on with the plan after
    the last one.

    Several environments take turns: while the policy decides for one of them, the others simulate, each in a thread of
    its own. Which one runs which episode does not depend on their speed.

    Args:
        env: any TorchRL environment, of any batch size (see :class:`EnvSlots`), whose reset reads ``task_id`` and
            ``init_state_id`` ``[*B, 1]`` and which reports them in its observations; or several, which must simulate
            in processes of their own (:func:`~torchrl_vla.envs.factory.make_envs`).
        policy: reads observations and writes an action; runs without gradients on the device of its parameters.
        plans: one per batch that iterating over the collector yields, or several where a batch needs more steps;
            :meth:`collect` needs none.

    Keyword Args:
        min_control_steps: fewest control steps of a batch (decisions where the environment does not report
            ``num_control_steps``): plans are put together until they have as many. How many that takes is guessed,
            before they run, from the episodes of the batch before, with a tenth to spare; where the guess falls short,
            more follow. Plans of one group each make batches of the nearest size. None: one plan per batch.
        total_frames: decisions, of the batches that iterating yields, after which it stops; -1 for as long as there are
            plans.
        init_random_frames: likewise, after which the policy acts; batches begun before hold random actions of the
            environment's spec, and nothing that the policy writes.
        seed: of the episodes' random numbers, not negative; None draws one from torch's global generator.
        exploration_type: RANDOM to sample, DETERMINISTIC to judge the greedy policy.
        not_stored: entries the policy sees or writes that are left out.
        next_keys: entries of the next observation that are stored where they exist.
        value_key: where a policy with a critic writes its value ``[N, 1]``.
        bootstrap_at_horizon: what comes after the last decision of an episode that ran out of time. False: nothing, as
            after any other end, for a time-out is how a task like LIBERO's fails; ``("next", "terminated")`` is set
            there, and ``("next", value_key)`` is 0. True: the value of what was seen then.
        progress: called after every step.
        pre_collect_hook: called before each batch that iterating yields.
        post_collect_hook: called with each batch that iterating yields.

    Examples:
        >>> from torchrl_vla.collectors import EpisodePlan
        >>> from torchrl_vla.envs.toy import ToyTrackingEnv
        >>> def act(tensordict):  # to the target that the state shows
        ...     target = tensordict["observation", "state"][..., 2:].unsqueeze(-2)
        ...     return tensordict.set("action", target.expand(*tensordict.shape, 4, 2))
        >>> plans = EpisodePlan.stream({0: range(50)}, groups=2, group_size=4, seed=0)
        >>> collector = GroupCollector(ToyTrackingEnv(3), act, plans, total_frames=16)
        >>> for batch in collector:
        ...     print(len(batch), batch["group_id"].unique().tolist(), int(batch["next", "success"].sum()))
        8 [0, 1] 8
        8 [2, 3] 8

    Raises:
        ValueError: if the environment does not report ``task_id`` and ``init_state_id``, or a number is out of range.
    """

    #: Large, and the loss computes them anew.
    NOT_STORED: tuple[NestedKey, ...] = (("vla_action", "logits"), ("vla_action", "hidden"))

    def __init__(
        self,
        env: EnvBase | Sequence[EnvBase],
        policy: Callable[[TensorDictBase], TensorDictBase],
        plans: Iterable[Sequence[Episode]] = (),
        *,
        min_control_steps: int | None = None,
        total_frames: int = -1,
        init_random_frames: int = 0,
        seed: int | None = None,
        exploration_type: ExplorationType = ExplorationType.RANDOM,
        not_stored: Sequence[NestedKey] = NOT_STORED,
        next_keys: Sequence[NestedKey] = ("success", "num_control_steps"),
        value_key: NestedKey = "state_value",
        bootstrap_at_horizon: bool = False,
        progress: Callable[[Progress], None] | None = None,
        pre_collect_hook: Callable[[], None] | None = None,
        post_collect_hook: Callable[[TensorDictBase], None] | None = None,
    ) -> None:
        super().__init__(
            plans,
            min_control_steps=min_control_steps,
            total_frames=total_frames,
            seed=seed,
            pre_collect_hook=pre_collect_hook,
            post_collect_hook=post_collect_hook,
        )
        envs = [env] if isinstance(env, EnvBase) else list(env)
        if not envs:
            raise UserError("The collector needs at least one environment, got an empty list.")
        self.policy = policy
        self.init_random_frames = init_random_frames
        self.exploration_type = exploration_type
        self.value_key = value_key
        self.bootstrap_at_horizon = bootstrap_at_horizon
        self.progress = progress
        self._slots = [EnvSlots(each) for each in envs]
        self._not_stored = frozenset((*not_stored, SEED_KEY))
        self._next_keys = (*envs[0].reward_keys, *envs[0].done_keys, *next_keys)

    @property
    def num_slots(self) -> int:
        """Episodes that can run at the same time."""
        return sum(map(len, self._slots))

    @torch.no_grad()
    def collect(
        self, plan: Sequence[Episode], *, number: int | None = None, stop: Callable[[], bool] | None = None
    ) -> TensorDict:
        """Run the episodes of a plan.

        Args:
            plan: at least one episode, such as an :class:`EpisodePlan`, or a part of one.
            number: which of the run's collections it is, for the episodes' random numbers; by default as many came
                before. Collectors that share out one plan must be given the same.
            stop: asked after every step; True ends the collection, and the episodes that still run are left out.

        Returns:
            Their decisions, ``[T]``, the episodes in the plan's order.

        Raises:
            ValueError: if the plan is empty, or has an episode twice.
            RuntimeError: if the environment starts another episode than it was asked to.
        """
        if not len(plan):
            raise UserError("The plan has no episodes; it needs at least one.")
        seeds = episode_seeds(self.seed, self._collections if number is None else number, plan)
        collection = _Collection(plan, seeds, [Lane(slots) for slots in self._slots])
        with set_exploration_type(self.exploration_type), make_executor(len(self._slots)) as executor:
            # In turns and in a fixed order, so that the same seed gives the same batch whoever is faster.
            while collection.finished < len(plan) and not (stop is not None and stop()):
                for lane in collection.lanes:
                    outcome = lane.wait()
                    if outcome is not None:
                        self._record(collection, lane, outcome)
                    self._send(collection, lane, executor)
        # Those that a stop has left in the middle; else there are none.
        collection.recorder.discard(torch.cat([lane.current[lane.current >= 0] for lane in collection.lanes]))
        batch = self._label(collection)
        self._count(plan)
        # On a GPU a policy finds what was wrong with a decision after it: here the last ones are waited for.
        for module in self.policy.modules() if isinstance(self.policy, nn.Module) else ():
            getattr(module, "raise_errors", lambda: None)()
        return batch

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """Close the environments.

        Args:
            timeout: for TorchRL's collectors of several processes; no effect here.
            close_env: False leaves them open, for whoever shares them.
            raise_on_error: raise what an environment raises while it closes.
        """
        for slots in self._slots:
            if close_env and not slots.env.is_closed:
                slots.env.close(raise_if_closed=raise_on_error)

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seed the episodes' random numbers, and the environments.

        Args:
            seed: not negative.
            static_seed: give all environments the same one.

        Returns:
            The seed for whatever comes next.
        """
        if seed < 0:
            raise UserError(f"seed={seed} must not be negative.")
        self.seed = seed
        for slots in self._slots:
            seed = slots.env.set_seed(seed, static_seed=static_seed)
        return seed

    def _maybe_fallback_update(self, policy_or_weights: Any = None, *, model_id: str | None = None) -> None:
        """Copy weights into the policy, as ``update_policy_weights_`` asks; without any there is nothing to do.

        The policy is of this process, and mostly the learner's own.
        """
        if model_id not in (None, "policy"):
            raise KeyError(f"model_id={model_id!r} is unknown: this collector has one model, 'policy'.")
        if policy_or_weights is None or policy_or_weights is self.policy:
            return
        if not isinstance(self.policy, nn.Module):
            raise TypeError(f"The policy is a {type(self.policy).__name__}, not a module: it has no weights to update.")
        weights, own = policy_or_weights, {id(parameter) for parameter in self.policy.parameters()}
        if isinstance(weights, nn.Module) and own.issuperset(map(id, weights.parameters())):
            return
        if not isinstance(weights, TensorDictBase):  # as a loss's TensorDictParams are, which are a module too
            is_module = isinstance(weights, nn.Module)
            weights = TensorDict.from_module(weights) if is_module else TensorDict(weights).unflatten_keys(".")
        with torch.no_grad():
            # Not through `.data`, where a policy that keeps copies of its weights would not notice.
            TensorDict.from_module(self.policy).update_(weights)

    def _send(self, collection: _Collection, lane: Lane, executor: Executor) -> None:
        """Decide for the slots of an environment that run, and give it its next turn."""
        running = lane.running()
        starts = collection.waiting.take(lane)
        decision = None
        if len(running):
            seen = lane.slots.observe(running)
            decision = Decision(running, seen, self._decide(collection, lane, running, seen))
        if decision is not None or starts or len(lane.again):
            keep_cut = self.bootstrap_at_horizon and decision is not None and self.value_key in decision.written
            lane.send(executor, collection.plan, decision, starts, keep_cut)

    def _record(self, collection: _Collection, lane: Lane, outcome: Outcome) -> None:
        """Take note of what followed from an environment's last decisions, and of the episodes begun since."""
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
        over = following["done"].reshape(-1).cpu()
        if outcome.cut is not None:
            cut = slots[over & ~following["terminated"].reshape(-1).cpu()]
            collection.last_values[current[cut]] = self._act(outcome.cut)[self.value_key].cpu()
        if not self.bootstrap_at_horizon:
            following["terminated"] = following["done"]
        recorder.append(current[slots], self._decisions(seen, written, following))
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

    def _decide(
        self, collection: _Collection, lane: Lane, running: Tensor, seen: TensorDict
    ) -> dict[NestedKey, Tensor]:
        episodes = lane.current[running]
        seeds = decision_seeds(collection.seeds[episodes], collection.recorder.lengths[episodes])
        if self._frames < self.init_random_frames:
            return lane.slots.random_actions(seeds)
        return self._act(seen.clone(False).set(SEED_KEY, seeds))

    def _act(self, seen: TensorDict) -> dict[NestedKey, Tensor]:
        """Ask the policy, on its device, and return what it writes, without what is not stored."""
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
        for key in _LABELS:
            ids = torch.tensor([[getattr(episode, key)] for episode in plan])
            data.set(key, ids.repeat_interleave(lengths, 0))
        episodes = torch.arange(len(plan)) + self._episodes
        data.set(("collector", "traj_ids"), episodes.repeat_interleave(lengths))
        steps = data.get(("next", "num_control_steps"), None)
        if steps is not None:
            data.set(MASK_KEY, torch.arange(self._slots[0].chunk_size) < steps)
        if self.value_key in data.keys(True, True):
            following = data.get(self.value_key).roll(-1, 0)
            ran = lengths > 0
            following[lengths.cumsum(0)[ran] - 1] = collection.last_values[ran]
            data.set(_next(self.value_key), following)
        return data


class _Collection:
    """How far the episodes of a plan have come, and what was recorded of them."""

    def __init__(self, plan: Sequence[Episode], seeds: Tensor, lanes: Sequence[Lane]) -> None:
        self.plan = plan
        self.seeds = seeds
        self.lanes = lanes
        self.waiting = Waiting(len(plan), lanes)
        self.recorder = TrajectoryRecorder(len(plan))
        self.last_values = torch.zeros(len(plan), 1)
        self.finished = self.successes = 0


def _next(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)
