"""The learning rates of a run: a linear rise, and then what the options say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from torchrl_vla.errors import UserError

__all__ = ["LearningRateSchedule"]

_DECAYS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


class LearningRateSchedule(LambdaLR):
    """Raises the optimizer's learning rates linearly to their values, then holds or lowers them to the run's end.

    AdamW's first steps are as large as its learning rate, however uncertain its estimates are: hence the rise. A run
    ends after so many control steps, not optimizer steps; so the fall follows `progress`, which the loop sets.

    Args:
        optimizer: its groups' rates are those to reach.
        warmup_steps: optimizer steps of the rise; the first step has ``1 / warmup_steps`` of the rate.
        decay: ``"constant"``, or ``"linear"`` or ``"cosine"`` down to 0 at the end.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = LearningRateSchedule(optimizer, warmup_steps=2, decay="linear")
        >>> schedule.get_last_lr()
        [0.5]
        >>> optimizer.step(); schedule.set_progress(0.25); schedule.step(); schedule.get_last_lr()
        [0.75]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        warmup_steps: int = 0,
        decay: Literal["constant", "linear", "cosine"] = "constant",
    ) -> None:
        if decay not in _DECAYS:
            raise UserError(f"decay={decay!r} is unknown: choose one of {list(_DECAYS)}.")
        self._progress = 0.0
        fall = _DECAYS[decay]

        def factor(steps: int) -> float:
            return min(1.0, (steps + 1) / max(1, warmup_steps)) * fall(self._progress)

        super().__init__(optimizer, factor)

    def set_progress(self, progress: float) -> None:
        """Say which share of the run is over, 0 to 1; it counts from the next step on."""
        self._progress = min(max(progress, 0.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """How far it has come. The rates themselves are the optimizer's, and those of the options on resume."""
        return {"steps": self.last_epoch, "progress": self._progress}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, and set the rates; load the optimizer's state before."""
        self.last_epoch, self._progress = int(state["steps"]), float(state["progress"])
        self._last_lr = [
            rate * factor(self.last_epoch) for rate, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
