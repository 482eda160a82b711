"""A running average of the weights that learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["ParameterAverage"]


class ParameterAverage:
    """Exponential moving average of parameters, in float32, kept beside them and swapped in where it is wanted.

    After ``n`` updates the decay is ``min(decay, (1 + n) / (10 + n))``, so that the initial weights, which are noise in
    a model trained from nothing, are soon forgotten.

    Args:
        parameters: of the model; those that do not learn are left out.
        decay: share of the average that stays at each update; 0 keeps no average.

    Source of the schedule: TensorFlow's ``ExponentialMovingAverage(num_updates=...)``.

    Examples:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> average = ParameterAverage([weight], decay=0.999)
        >>> weight.data.fill_(11.0)
        tensor([11.])
        >>> average.update()  # the first decay is 1 / 10
        >>> with average.swapped_in():
        ...     weight.item()
        9.899999618530273
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.decay = decay
        self.updates = 0
        self.average = [parameter.detach().float().clone() for parameter in self.parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values in."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = [parameter.detach().float() for parameter in self.parameters]
        get_ema_multi_avg_fn(decay)(self.average, current, None)

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Give the parameters their averages for a while."""
        present = [parameter.detach().clone() for parameter in self.parameters] if self.decay else []
        for parameter, average in zip(self.parameters, self.average, strict=False):
            parameter.copy_(average)
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, present, strict=False):
                parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and how many updates it has seen."""
        return {"updates": self.updates, "average": {str(i): value for i, value in enumerate(self.average)}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.updates = int(state["updates"])
        for index, value in enumerate(self.average):
            value.copy_(state["average"][str(index)])
