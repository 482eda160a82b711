"""TorchRL's ToyVLAEnv with the interface of LiberoEnv: a task to learn in seconds, without a simulator."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import ToyVLAEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_vla.errors import UserError

__all__ = ["ToyTrackingEnv", "greedy_success_rate"]


class ToyTrackingEnv(ToyVLAEnv):
    """ToyVLAEnv's tracking task, one decision (a chunk of actions) per step, started where the caller asks.

    The state shows a target action; the episode succeeds when ``success_steps`` actions in a row come within
    ``success_tol`` of it. What ToyVLAEnv needs transforms for (``MultiAction``, ``SuccessReward``, ``StepCounter``)
    happens inside the step, and the initial state, that is the target, can be chosen for each slot at reset, which is
    what groups need. The defaults are the setting of TorchRL's ``vla_grpo`` recipe.

    Reset reads, and every observation reports, ``task_id`` (there is one, 0) and ``init_state_id`` ``[*B, 1]`` (any
    non-negative number; it seeds the target; by default the slots count on). ``success`` and ``num_control_steps``
    are reported as by :class:`~torchrl_vla.envs.LiberoEnv`; the reward is 1 at success, else 0.

    Args:
        num_envs: slots; None for an environment without batch dimension.

    Keyword Args:
        chunk_size: actions per decision.
        max_decisions: decisions until truncation.
        success_steps: consecutive actions near the target that make a success.
        success_tol: how near, in every dimension.
        action_dim: dimensions of an action.
        seed: of the random images.

    Examples:
        >>> env = ToyTrackingEnv(2)
        >>> data = env.reset(TensorDict({"init_state_id": torch.tensor([[7], [7]])}, [2]))
        >>> data["action"] = data["observation", "state"][:, 2:].unsqueeze(1).expand(2, 4, 2)
        >>> env.step(data)["next", "success"].squeeze(-1), data["next", "num_control_steps"].squeeze(-1)
        (tensor([True, True]), tensor([2, 2]))
    """

    _streak: Tensor
    _target: Tensor

    def __init__(
        self,
        num_envs: int | None = None,
        *,
        chunk_size: int = 4,
        max_decisions: int = 6,
        success_steps: int = 2,
        success_tol: float = 0.35,
        action_dim: int = 2,
        seed: int | None = None,
    ) -> None:
        if chunk_size < 1 or max_decisions < 1 or (num_envs is not None and num_envs < 1):
            raise UserError(
                f"num_envs={num_envs}, chunk_size={chunk_size} and max_decisions={max_decisions} must be at least 1."
            )
        batch = torch.Size([] if num_envs is None else [num_envs])
        super().__init__(
            action_dim=action_dim,
            state_dim=2 * action_dim,
            success_steps=success_steps,
            success_tol=success_tol,
            batch_size=batch,
            seed=seed,
        )
        self.chunk_size = chunk_size
        self.max_decisions = max_decisions
        self._decisions = torch.zeros(*batch, 1, dtype=torch.int64)
        self._init_state_id = torch.zeros(*batch, 1, dtype=torch.int64)
        self._next_init_state_id = 0
        ids = Composite(
            task_id=Bounded(0, 0, shape=(*batch, 1), dtype=torch.int64),
            init_state_id=Unbounded(shape=(*batch, 1), dtype=torch.int64),
            shape=batch,
        )
        self.state_spec = ids.clone()
        self.observation_spec.update(ids)
        self.observation_spec["num_control_steps"] = Unbounded(shape=(*batch, 1), dtype=torch.int64)
        self.action_spec = Bounded(-1.0, 1.0, shape=(*batch, chunk_size, action_dim))
        flag = Categorical(2, dtype=torch.bool, shape=(*batch, 1))
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=batch)

    def _instruction_stack(self) -> str | NonTensorData:
        # Stored once, not once per slot, which would take most of a step's time.
        return NonTensorData(self.instruction, batch_size=self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        mask = torch.ones_like(self._streak, dtype=torch.bool) if mask is None else mask.reshape(self._streak.shape)
        ids = None if tensordict is None else tensordict.get("init_state_id", None)
        if tensordict is not None and tensordict.get("task_id", self._streak.new_zeros(1)).any():
            raise UserError(f"ToyTrackingEnv has one task, 0; got task_id {tensordict['task_id'].flatten().tolist()}.")
        if ids is None:
            ids = self._next_init_state_id + torch.arange(mask.numel()).reshape(mask.shape)
            self._next_init_state_id += mask.numel()
        self._init_state_id = torch.where(mask, ids, self._init_state_id)
        targets = torch.stack([_target(i, self.action_dim) for i in self._init_state_id.flatten().tolist()])
        self._target = targets.reshape(self._target.shape)
        self._streak = torch.where(mask, 0, self._streak)
        self._decisions = torch.where(mask, 0, self._decisions)
        return self._report(None, torch.zeros_like(mask), torch.zeros_like(self._streak))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        chunk = tensordict.get("action")
        mask = tensordict.get("_step", None)
        running = torch.ones_like(self._streak, dtype=torch.bool) if mask is None else mask.reshape(self._streak.shape)
        near = ((chunk - self._target.unsqueeze(-2)).abs() <= self.success_tol).all(-1)
        success = torch.zeros_like(running)
        steps = torch.zeros_like(self._streak)
        for hit in near.unsqueeze(-2).unbind(-1):
            going = running & ~success
            self._streak = torch.where(going, torch.where(hit, self._streak + 1, 0), self._streak)
            steps += going
            success |= going & (self._streak >= self.success_steps)
        self._decisions = self._decisions + running
        last_step = (steps - 1).clamp_min(0).unsqueeze(-1).expand(*steps.shape, self.action_dim)
        last = chunk.gather(-2, last_step).squeeze(-2)
        out = self._report(last, success, steps)
        out["reward"] = success.float()
        return out

    def _report(self, action: Tensor | None, success: Tensor, steps: Tensor) -> TensorDict:
        out = self._obs(self._make_state(action))
        truncated = (self._decisions >= self.max_decisions) & ~success
        flags = {"success": success, "terminated": success.clone(), "truncated": truncated, "done": success | truncated}
        ids = {"task_id": torch.zeros_like(self._init_state_id), "init_state_id": self._init_state_id.clone()}
        out.update({**flags, **ids, "num_control_steps": steps})
        return out


@torch.no_grad()
def greedy_success_rate(
    policy: Callable[[TensorDictBase], TensorDictBase],
    *,
    success_tol: float = 0.35,
    shuffled: bool = False,
    episodes: int = 512,
) -> float:
    """Judge a greedy policy on targets that are kept apart for that.

    Args:
        policy: takes a ``tensordict`` and writes ``action``, a chunk of four actions of two dimensions.

    Keyword Args:
        success_tol: how near the target an action must come.
        shuffled: show each episode another one's target. That is the control: a policy that does not read its target
            succeeds as often as without.
        episodes: how many, each with a target of its own.

    Examples:
        >>> def aim(tensordict: TensorDictBase) -> TensorDictBase:
        ...     target = tensordict["observation", "state"][:, None, 2:]
        ...     return tensordict.set("action", target.expand(-1, 4, 2))
        >>> greedy_success_rate(aim), greedy_success_rate(aim, shuffled=True) < 0.5
        (1.0, True)
    """
    state = ("observation", "state")

    def shuffle(shown: Tensor) -> Tensor:
        echo, target = shown.split(2, -1)
        return torch.cat([echo, target.roll(1, 0)], -1)

    if shuffled:
        policy = TensorDictSequential(TensorDictModule(shuffle, in_keys=[state], out_keys=[state]), policy)
    env = ToyTrackingEnv(episodes, success_tol=success_tol)
    targets = torch.arange(10**6, 10**6 + episodes).unsqueeze(-1)  # training starts from lower ids
    start = env.reset(TensorDict({"init_state_id": targets}, [episodes]))
    options = {"auto_reset": False, "break_when_any_done": False, "break_when_all_done": True}
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        rollout = env.rollout(env.max_decisions, policy, tensordict=start, **options)
    return rollout["next", "success"].any(1).float().mean().item()


@lru_cache(maxsize=1 << 16)
def _target(init_state_id: int, action_dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(init_state_id)
    return torch.rand(action_dim, generator=generator) - 0.5
