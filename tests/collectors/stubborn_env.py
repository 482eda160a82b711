"""An environment of short episodes whose ends are known, and a policy that remembers how it was called."""

from __future__ import annotations

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase
from torch import nn
from torchrl.data import Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, exploration_type

SUCCESS_AFTER, FAILURE_AFTER = 1, 4


class StubbornEnv(EnvBase):
    """Even initial states succeed after 1 decision, odd ones are cut after 4; asked for nothing it draws one."""

    def __init__(self, num_envs: int | None = None, ignores_requests: bool = False) -> None:
        batch = torch.Size([] if num_envs is None else [num_envs])
        super().__init__(batch_size=batch)

        def flag() -> Categorical:
            return Categorical(2, shape=(*batch, 1), dtype=torch.bool)

        def number() -> Unbounded:
            return Unbounded(shape=(*batch, 1), dtype=torch.int64)

        ids = Composite(task_id=number(), init_state_id=number(), shape=batch)
        self.state_spec = ids
        observation = Composite(image=Unbounded((*batch, 3, 4, 4), dtype=torch.uint8), shape=batch)
        text = NonTensor(shape=batch, example_data="")
        self.observation_spec = Composite(
            observation=observation, time=number(), success=flag(), language_instruction=text, shape=batch
        )
        self.observation_spec.update(ids.clone())
        self.action_spec = Unbounded(shape=(*batch, 2))
        self.reward_spec = Unbounded(shape=(*batch, 1))
        self.done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=batch)
        self.time = torch.zeros(*batch, 1, dtype=torch.int64)
        self.ids = {"task_id": self.time.clone(), "init_state_id": self.time.clone()}
        self.slot_steps = 0
        self.ignores_requests = ignores_requests

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        mask = torch.ones_like(self.time, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            mask = tensordict["_reset"].reshape(mask.shape)
        for key, current in self.ids.items():
            asked = torch.randint_like(current, 1000)
            if tensordict is not None and key in tensordict.keys() and not self.ignores_requests:
                asked = tensordict[key]
            self.ids[key] = torch.where(mask, asked, current)
        self.time = torch.where(mask, 0, self.time)
        return self._observe(torch.zeros_like(self.time, dtype=torch.bool))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        mask = tensordict.get("_step", torch.ones_like(self.time, dtype=torch.bool)).reshape(self.time.shape)
        assert not torch.isnan(tensordict["action"][mask.squeeze(-1)]).any()
        self.slot_steps += int(mask.sum())
        self.time = self.time + mask
        out = self._observe((self.ids["init_state_id"] % 2 == 0) & (self.time >= SUCCESS_AFTER))
        return out.set("reward", out["success"].float())

    def _observe(self, success: torch.Tensor) -> TensorDict:
        cut = (self.time >= FAILURE_AFTER) & ~success
        image = self.time.to(torch.uint8).reshape(*self.batch_size, 1, 1, 1).expand(*self.batch_size, 3, 4, 4).clone()
        texts = [f"task {task}" for task in self.ids["task_id"].flatten().tolist()]
        return TensorDict(
            {
                "observation": {"image": image},
                "time": self.time.clone(),
                "success": success,
                "language_instruction": NonTensorStack(*texts) if self.batch_size else NonTensorData(texts[0]),
                "done": success | cut,
                "terminated": success.clone(),
                "truncated": cut,
                **{key: value.clone() for key, value in self.ids.items()},
            },
            self.batch_size,
        )

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


class Policy(nn.Module):
    """Writes an action, what is stored, and what is not; remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.batches: list[TensorDictBase] = []

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.batches.append(tensordict.clone(False))
        assert exploration_type() is ExplorationType.RANDOM and not torch.is_grad_enabled()
        time = tensordict["time"].float() * self.weight
        tensordict["action"] = time.expand(*tensordict.batch_size, 2) + 0
        tensordict["vla_action", "log_probs"] = -time.unsqueeze(-1)
        tensordict["vla_action", "logits"] = torch.zeros(*tensordict.batch_size, 8, 7, 256)
        return tensordict
