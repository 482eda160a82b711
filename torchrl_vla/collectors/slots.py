"""An environment as slots that start and step independently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs import EnvBase

from torchrl_vla.collectors.plan import Episode
from torchrl_vla.collectors.trajectories import non_tensor, non_tensor_leaves


class EnvSlots:
    """Starts, observes and steps any subset of a batched environment's slots.

    Resets go through TorchRL's ``"_reset"`` mask and steps through its ``"_step"`` mask. An environment with an empty
    batch size has one slot.

    Args:
        env: batch size ``[N]`` or ``[]``; reads and reports ``task_id`` and ``init_state_id``.

    Raises:
        ValueError: if it has several batch dimensions or does not report the two.
    """

    def __init__(self, env: EnvBase) -> None:
        if len(env.batch_size) > 1:
            raise ValueError(f"The environment's batch size is {tuple(env.batch_size)}; it must be [] or [N].")
        missing = {"task_id", "init_state_id"} - set(env.observation_spec.keys())
        if missing:
            raise ValueError(
                f"The environment does not report {sorted(missing)}: without them in its observations nobody could "
                "tell whether it started the planned episode. LiberoEnv reports them; add them to yours."
            )
        self.env = env
        self.device = env.device or torch.device("cpu")
        self._batched = bool(env.batch_size)
        self._size = env.batch_size[0] if self._batched else 1
        self._tensors: dict[NestedKey, Tensor] = {}
        self._others: dict[NestedKey, list[Any]] = {}

    def __len__(self) -> int:
        return self._size

    def start(self, slots: Tensor, episodes: Sequence[Episode]) -> None:
        """Reset some slots, int64 ``[n]``, to the starts of n episodes.

        Raises:
            RuntimeError: if the environment started elsewhere.
        """
        mask = self._mask(slots)
        if not self._tensors:
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
        if not mask.all():
            request.set("_reset", mask.unsqueeze(-1))
        state = self._call(self.env.reset, request)
        for key, value in asked.items():
            if not torch.equal(state.get(key)[slots], value):
                raise RuntimeError(
                    f"Asked to start at {key} {value.flatten().tolist()}, the environment started at "
                    f"{state.get(key)[slots].flatten().tolist()}: its reset must read {key!r} from the TensorDict."
                )
        for key, value in state.items(True, True):
            rows = mask.reshape(-1, *(1,) * (value.ndim - 1))
            self._tensors[key] = torch.where(rows, value, self._tensors[key]) if key in self._tensors else value
        self._keep_others(slots, state)

    def observe(self, slots: Tensor) -> TensorDict:
        """What some slots, int64 ``[n]``, show now: ``[n]``, a copy."""
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
            decision.set("_step", self._mask(slots))
        following = self._call(self.env.step, decision).get("next")
        tensors = dict(following.items(True, True))
        self._tensors |= {key: value for key, value in tensors.items() if key not in self.env.reward_keys}
        self._keep_others(slots, following)
        return {key: value[slots] for key, value in tensors.items()}

    def _mask(self, slots: Tensor) -> Tensor:
        mask = torch.zeros(self._size, dtype=torch.bool, device=self.device)
        mask[slots] = True
        return mask

    def _call(self, function: Callable[[TensorDictBase], TensorDictBase], tensordict: TensorDict) -> TensorDictBase:
        return function(tensordict) if self._batched else function(tensordict.squeeze(0)).unsqueeze(0)

    def _keep_others(self, slots: Tensor, state: TensorDictBase) -> None:
        for key, values in non_tensor_leaves(state).items():
            kept = self._others.setdefault(key, [None] * self._size)
            for slot in slots.tolist():
                kept[slot] = values[slot]
