"""The policy that a run started from, which a KL penalty holds on to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs.transforms import Transform

from torchrl_vla.modules import OpenVLA
from torchrl_vla.modules.openvla.lora import has_lora, without_adapters
from torchrl_vla.objectives import AsymmetricClipPPOLoss

__all__ = ["ReferenceLogProb", "reference_policy"]


def reference_policy(model: OpenVLA) -> Callable[[], AbstractContextManager[Any]]:
    """Keep the policy as it is now, and make contexts in which the network is that policy.

    With adapters the reference is the network without them, which costs no memory; else a copy of the weights that
    learn, which takes their place for a while.

    Args:
        model: the network, before it learns.

    Returns:
        What makes such a context.
    """
    if has_lora(model):
        return partial(without_adapters, model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def first_weights() -> Iterator[None]:
        current = [parameter.data for parameter in parameters]
        _set_data(parameters, first)
        try:
            yield
        finally:
            _set_data(parameters, current)

    return first_weights


def _set_data(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value


class ReferenceLogProb(Transform):
    """Store the reference policy's log-probabilities with the decisions that a replay buffer is filled with.

    They are computed once an update and not once an epoch, and only of decisions that an advantage before it has kept.

    Args:
        loss: with a reference, and the key to store under.
        batch_size: decisions per forward.
    """

    def __init__(self, loss: AsymmetricClipPPOLoss, batch_size: int = 32) -> None:
        super().__init__()
        self._loss = [loss]  # in a list, or its parameters would be the buffer's too
        self.batch_size = batch_size

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Leave what is read from the buffer as it is."""
        return tensordict

    def _inv_call(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        if tensordict is None or not len(tensordict):  # nothing is left of what another transform was given
            return tensordict
        loss = self._loss[0]
        device = next(loss.parameters()).device
        parts = [loss.reference_log_prob(part.to(device)).cpu() for part in tensordict.split(self.batch_size)]
        return tensordict.set(loss.tensor_keys.reference_log_prob, torch.cat(parts))
