"""The policy that a run started from, which a KL penalty holds on to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from torchrl_vla.modules import OpenVLA
from torchrl_vla.modules.openvla.lora import has_lora, without_adapters

__all__ = ["reference_policy"]


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
