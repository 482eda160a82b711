"""Notices weights that were exchanged or moved, and copies adapters to where they are computed with."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from torchrl_vla.modules.openvla.adapter_kernel import fuse_copies
from torchrl_vla.modules.openvla.linear import Adapters, adapter_copies

_get_version = operator.attrgetter("_version")


class WeightWatch:
    """The parameters of a model, where they lie, and the layers that hold them.

    Found once: walking through a model of thousands of modules takes longer than a forward.

    Args:
        model: the model as it is to stay.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> watch = WeightWatch(layer)
        >>> layer.weight = nn.Parameter(torch.zeros(2, 2))
        >>> watch.exchanged() is None, WeightWatch(layer).exchanged() is None
        (False, True)
    """

    def __init__(self, model: nn.Module) -> None:
        places: list[tuple[Any, str]] = []
        for module in model.modules():
            places += [(module._parameters, name) for name, found in module._parameters.items() if found is not None]
            children = module._modules.items()
            places += [(module._modules, name) for name, child in children if _holds_weights(child)]
            if isinstance(module, LoraLayer):
                places += [(module.scaling, name) for name in module.scaling]
        self._owners, self._names = [owner for owner, _ in places], [name for _, name in places]
        self._found = self._look()
        self._parameters = [found for found in self._found if isinstance(found, nn.Parameter)]
        self._addresses = self._locate()
        # Where a parameter is given other memory, the old is read once more before that is noticed.
        self._memory = [parameter.data for parameter in self._parameters]
        # Any adapted layer: they are switched on and off together.
        self._switch = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)

    @property
    def adapters_off(self) -> bool:
        """Whether the adapters are left out."""
        return self._switch is not None and self._switch.disable_adapters

    def exchanged(self) -> list[object] | None:
        """Return what is in the places of the weights, if it is not what was there; None if it is."""
        present = self._look()
        return None if all(map(operator.is_, present, self._found)) else present

    def moved(self) -> bool:
        """Whether a parameter's memory is another, as after ``parameter.data = tensor``."""
        return self._locate() != self._addresses

    def _look(self) -> list[object]:
        return list(map(dict.get, self._owners, self._names))

    def _locate(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._parameters))


def _holds_weights(module: nn.Module | None) -> bool:
    return module is not None and (bool(module._parameters) or isinstance(module, LoraLayer))


class AdapterCopier:
    """Makes the copies of adapters that are computed with.

    Args:
        adapters: with copies; made anew once a tensor lies elsewhere.
    """

    def __init__(self, adapters: Sequence[Adapters]) -> None:
        self._copies = [copy for one in adapters for copy in adapter_copies(one)]
        self._targets = [tensor for one in adapters for tensor in (one.down, one.extended) if tensor is not None]
        self._sources = [copy.source for copy in self._copies]
        self._version = self._current_version()
        self._fused = fuse_copies(self._copies)

    @torch.no_grad()
    def __call__(self) -> None:
        """Copy all of them."""
        if self._fused is not None:
            self._fused()
        else:
            for source, target, scale in self._copies:
                target.copy_(source if scale == 1.0 else source * scale)
        if (version := self._current_version()) != self._version:
            # Autograd is told of changes that it can know of, as it is without copies: a backward pass through what
            # was computed before is refused.
            for tensor in self._targets:
                tensor[:0].zero_()
            self._version = version

    def _current_version(self) -> int:
        return sum(map(_get_version, self._sources))
