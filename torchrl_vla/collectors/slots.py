"""An environment as slots that start and step independently."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs import EnvBase, TransformedEnv

from torchrl_vla.collectors.plan import Episode
from torchrl_vla.collectors.trajectories import non_tensor, non_tensor_leaves
from torchrl_vla.errors import UserError

__all__ = ["EnvSlots", "ReplacesWorkers"]


class ReplacesWorkers(Protocol):
    """An environment of several workers, equal parts of its batch, that replaces those that die or hang.

    :class:`~torchrl_vla.envs.watchdog.WatchedParallelEnv` is one.
    """

    num_workers: int

    @property
    def lost_workers(self) -> Collection[int]:
        """Workers that were replaced during the last step, so that their episodes are lost."""
        ...


def replaces_workers(env: Any) -> TypeGuard[ReplacesWorkers]:
    """Tell whether an environment is a :class:`ReplacesWorkers`."""
    # Not hasattr: TorchRL's batched environments answer for any name, in the place of their workers.
    return inspect.getattr_static(env, "lost_workers", None) is not None


class EnvSlots:
    """Starts, observes and steps any subset of a batched environment's slots.

    Resets go through TorchRL's ``"_reset"`` mask and steps through its ``"_step"`` mask. An environment with an empty
    batch size has one slot, one with several batch dimensions (workers that hold several environments each) as many as
    it has entries. There the mask selects whole workers, as TorchRL's batched environments want it: a slot that is done
    is stepped along if another one of its worker is not, which LiberoEnv ignores.

    Args:
        env: reads and reports ``task_id`` and ``init_state_id``.

    Raises:
        ValueError: if it does not report the two.
    """

    def __init__(self, env: EnvBase) -> None:
        missing = {"task_id", "init_state_id"} - set(env.observation_spec.keys())
        if missing:
            raise UserError(
                f"The environment does not report {sorted(missing)}: without them in its observations nobody could "
                "tell whether it started the planned episode. LiberoEnv reports them; add them to yours."
            )
        self.env = env
        self.device = env.device or torch.device("cpu")
        self._size: int = env.batch_size.numel()
        workers = env.batch_size[0] if env.batch_dims > 1 else self._size
        #: All slots, int64 ``[size]``, the first of each worker before the second of any.
        self.in_turns = torch.arange(self._size).reshape(workers, -1).T.flatten()
        self._base_env = env
        while isinstance(self._base_env, TransformedEnv):
            self._base_env = self._base_env.base_env
        self._tensors: dict[NestedKey, Tensor] = {}
        self._others: dict[NestedKey, list[Any]] = {}

    def __len__(self) -> int:
        return self._size

    @property
    def chunk_size(self) -> int:
        """Actions per decision: ``K`` of actions ``[*B, K, D]``, 1 where they are ``[*B, D]``."""
        shape = self.env.full_action_spec[self.env.action_keys[0]].shape[self.env.batch_dims :]
        return shape[0] if len(shape) > 1 else 1

    def start(self, slots: Tensor, episodes: Sequence[Episode]) -> None:
        """Reset some slots, int64 ``[n]``, to the starts of n episodes.

        Raises:
            RuntimeError: if the environment started elsewhere.
        """
        mask = self._mask(slots)
        first = not self._tensors
        if first:
            self._tensors = dict(self.env.full_done_spec.zero().reshape(self._size).items(True, True))
            zeros = torch.zeros(self._size, 1, dtype=torch.int64, device=self.device)
            self._tensors |= {"task_id": zeros, "init_state_id": zeros}
        asked = {
            "task_id": torch.tensor([[episode.task_id] for episode in episodes], device=self.device),
            "init_state_id": torch.tensor([[episode.init_state_id] for episode in episodes], device=self.device),
        }
        request = TensorDict({}, [self._size], device=self.env.device)
        for key, value in self._tensors.items():
            request.set(key, value)
        for key, value in asked.items():
            request.set(key, self._tensors[key].index_copy(0, slots.to(self.device), value))
        if first:
            # Slots without an episode yet start too, where the first one does: a worker steps all that it holds.
            for key, value in asked.items():
                request.set(key, torch.where(mask.unsqueeze(-1), request.get(key), value[:1]))
        elif not mask.all():
            request.set("_reset", mask.unsqueeze(-1))
        state = self._call(self.env.reset, request)
        for key, value in asked.items():
            if not torch.equal(state.get(key)[slots], value):
                raise RuntimeError(
                    f"Asked to start at {key} {value.flatten().tolist()}, the environment started at "
                    f"{state.get(key)[slots].flatten().tolist()}: its reset must read {key!r} from the TensorDict."
                )
        # The request held everything, so TorchRL has kept the entries of the slots that were not reset.
        self._tensors |= dict(state.items(True, True))
        self._keep_others(torch.arange(self._size) if first else slots, state)

    def observe(self, slots: Tensor) -> TensorDict:
        """Return what some slots, int64 ``[n]``, show now: ``[n]``, a copy."""
        seen = TensorDict({}, [len(slots)], device=self.env.device)
        for key, value in self._tensors.items():
            seen.set(key, value[slots])
        for key, values in self._others.items():
            seen.set(key, non_tensor([values[slot] for slot in slots.tolist()]))
        return seen

    def step(self, slots: Tensor, written: Mapping[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        """Step some slots.

        Args:
            slots: int64 ``[n]``.
            written: what the policy wrote for them, ``[n, ...]``.

        Returns:
            What follows, reward and done flags included, ``[n, ...]``, a copy.
        """
        decision = TensorDict({}, [self._size], device=self.env.device)
        for key, value in self._tensors.items():
            decision.set(key, value)
        for key, value in written.items():
            everywhere = value.new_zeros(self._size, *value.shape[1:], device=self.device)
            everywhere[slots] = value.to(self.device)
            decision.set(key, everywhere)
        # Slots that do not step keep their texts: a SerialEnv needs what to fill their places with.
        for key, values in self._others.items():
            decision.set(key, non_tensor(values))
        if len(slots) < self._size:
            mask = self._mask(slots).reshape(self.env.batch_size or (1,))
            whole_workers = mask.flatten(1).any(1) if mask.ndim > 1 else mask
            decision.set("_step", whole_workers.reshape(-1, *(1,) * (mask.ndim - 1)).expand_as(mask).reshape(-1))
        following = self._call(self.env.step, decision).get("next")
        tensors = dict(following.items(True, True))
        self._tensors |= {key: value for key, value in tensors.items() if key not in self.env.reward_keys}
        self._keep_others(slots, following)
        return {key: value[slots] for key, value in tensors.items()}

    def random_actions(self, seeds: Tensor) -> dict[NestedKey, Tensor]:
        """Draw an action from the environment's specs for each seed, int64 ``[n, 1]``."""
        rows = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds.flatten().tolist():
                torch.default_generator.manual_seed(seed)
                rows.append(self.env.full_action_spec.rand().reshape(self._size)[0])
        return dict(TensorDict.stack(rows).items(True, True))

    def lost(self) -> Tensor:
        """Slots, bool ``[size]``, whose worker was replaced during the last step: their episodes are gone."""
        mask = torch.zeros(self._size, dtype=torch.bool)
        if replaces_workers(self._base_env):
            for worker in self._base_env.lost_workers:
                mask.view(self._base_env.num_workers, -1)[worker] = True
        return mask

    def _mask(self, slots: Tensor) -> Tensor:
        mask = torch.zeros(self._size, dtype=torch.bool, device=self.device)
        mask[slots] = True
        return mask

    def _call(self, function: Callable[[TensorDictBase], TensorDictBase], tensordict: TensorDict) -> TensorDictBase:
        return function(tensordict.reshape(self.env.batch_size)).reshape(self._size)

    def _keep_others(self, slots: Tensor, state: TensorDictBase) -> None:
        for key, values in non_tensor_leaves(state).items():
            kept = self._others.setdefault(key, [None] * self._size)
            for slot in slots.tolist():
                kept[slot] = values[slot]
