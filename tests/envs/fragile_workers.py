"""A small environment whose process dies, hangs or raises at a chosen step, as often as it is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

#: Decisions of an episode: of an even initial state, which succeeds, and of an odd one, which is cut.
LENGTHS = (2, 5)


class FragileEnv(EnvBase):
    """Counts its steps; with initial state 7 it comes to grief, at the third step or at the reset."""

    def __init__(self, num_envs: int | None, folder: Path, grief: str = "", at: str = "step", times: int = 1) -> None:
        batch = torch.Size([] if num_envs is None else [num_envs])
        super().__init__(batch_size=batch)
        self.folder, self.grief, self.at, self.times = folder, grief, at, times

        def flag() -> Categorical:
            return Categorical(2, shape=(*batch, 1), dtype=torch.bool)

        def number() -> Unbounded:
            return Unbounded(shape=(*batch, 1), dtype=torch.int64)

        self.state_spec = Composite(task_id=number(), init_state_id=number(), shape=batch)
        self.observation_spec = Composite(time=number(), success=flag(), total=Unbounded((*batch, 1)), shape=batch)
        self.observation_spec.update(self.state_spec.clone())
        self.action_spec = Unbounded(shape=(*batch, 2))
        self.reward_spec = Unbounded(shape=(*batch, 1))
        self.done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=batch)
        self.time = torch.zeros(*batch, 1, dtype=torch.int64)
        self.total = torch.zeros(*batch, 1)
        self.ids = {"task_id": self.time.clone(), "init_state_id": self.time.clone()}
        self.over = torch.ones(*batch, 1, dtype=torch.bool)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        mask = torch.ones_like(self.time, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            mask = tensordict["_reset"].reshape(mask.shape)
        for key, current in self.ids.items():
            asked = (
                tensordict[key] if tensordict is not None and key in tensordict.keys() else torch.zeros_like(current)
            )
            self.ids[key] = torch.where(mask, asked, current)
        self.time, self.total = torch.where(mask, 0, self.time), torch.where(mask, 0.0, self.total)
        self.over = self.over & ~mask
        self._come_to_grief("reset", mask & (self.ids["init_state_id"] == 7))
        return self._observe()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        goes_on = ~self.over & tensordict.get("_step", torch.ones_like(self.over)).reshape(self.over.shape)
        self.time = self.time + goes_on
        self.total = self.total + goes_on * tensordict["action"].sum(-1, keepdim=True)
        self._come_to_grief("step", goes_on & (self.time == 3) & (self.ids["init_state_id"] == 7))
        out = self._observe()
        self.over = out["done"]
        return out.set("reward", (out["success"] & goes_on).float())

    def _come_to_grief(self, command: str, where: torch.Tensor) -> None:
        if not self.grief or command != self.at or not where.any():
            return
        marks = len(list(self.folder.iterdir()))
        if marks >= self.times:
            return
        (self.folder / str(marks)).touch()
        if self.grief == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.grief == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.grief == "value":
            raise ValueError("the action is not a number")
        else:
            raise RuntimeError("the driver failed")

    def _observe(self) -> TensorDict:
        even = self.ids["init_state_id"] % 2 == 0
        success, cut = even & (self.time >= LENGTHS[0]), ~even & (self.time >= LENGTHS[1])
        flags = {"success": success, "done": success | cut, "terminated": success.clone(), "truncated": cut}
        ids = {key: value.clone() for key, value in self.ids.items()}
        return TensorDict({**flags, **ids, "time": self.time.clone(), "total": self.total.clone()}, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


class VariableEnv(FragileEnv):
    """Shows a variable of its process as ``total``."""

    def _observe(self) -> TensorDict:
        number = float(os.environ.get("MUJOCO_EGL_DEVICE_ID", "-1"))
        return super()._observe().set("total", torch.full_like(self.total, number))


class LingeringEnv(FragileEnv):
    """Its process has a thread that does not end."""

    def _come_to_grief(self, command: str, where: torch.Tensor) -> None:
        if where.any():
            threading.Thread(target=time.sleep, args=(60,)).start()
        super()._come_to_grief(command, where)
