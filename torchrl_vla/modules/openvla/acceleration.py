"""What keeps an accelerated OpenVLA right: copies of its adapters that follow them, and forwards recorded per state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchrl_vla.modules.openvla.blocks import LayerStack
from torchrl_vla.modules.openvla.graphs import ForwardGraphs
from torchrl_vla.modules.openvla.linear import copy_adapters


class Acceleration:
    """Fuses and compiles a model's layers, and runs its functions.

    Args:
        model: with its weights loaded, its adapters added and all in place.
        stacks: its layers.
        compile_layers: compile them.
        graph_batch_size: up to this batch size, calls without gradient on a GPU are replayed as CUDA graphs.
    """

    def __init__(
        self, model: nn.Module, stacks: Sequence[LayerStack], *, compile_layers: bool, graph_batch_size: int
    ) -> None:
        if compile_layers:
            # One entry per kind of call: with and without gradient, mask and adapters, for one sample and for many, of
            # the last layer and of those before.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for stack in stacks:
            stack.accelerate(compile_layers)
        self._stacks = stacks
        # Found once: walking through a model of thousands of modules takes longer than a forward.
        self._adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
        self._trained = [p for p in model.parameters() if p.requires_grad]
        # Any adapted layer: they are switched on and off together.
        self._switch = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
        self._version = self._current_version()
        self._graph_batch_size = graph_batch_size
        self._graphs: dict[Callable[..., Sequence[Tensor]], ForwardGraphs] = {}

    def run(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """Call a function of the model, with copies of the adapters that are up to date.

        Args:
            function: of tensors (or None) to tensors, as :class:`ForwardGraphs` takes it.
            inputs: its arguments.
        """
        self.refresh()
        if function not in self._graphs:
            self._graphs[function] = ForwardGraphs(function, self._graph_batch_size)
        graphs = self._graphs[function]
        return graphs(inputs, self._state()) if graphs.serves(inputs) else function(*inputs)

    def forget_graphs(self) -> None:
        """Give the memory of recorded calls back; the next one of each shape is recorded again."""
        self._graphs.clear()

    def forget_adapters(self) -> None:
        """Read the layers anew, once their adapters are merged: what was kept of them would add the adapters again."""
        for stack in self._stacks:
            stack.forget_weights()
        merged = {id(parameter) for parameter in self._adapters}
        self._trained = [parameter for parameter in self._trained if id(parameter) not in merged]
        self._adapters, self._switch = [], None
        self.forget_graphs()

    def _state(self) -> Hashable:
        """What a call depends on beside its inputs: where the trained weights lie, adapters on or off."""
        off = self._switch is not None and self._switch.disable_adapters
        return off, *(parameter.data_ptr() for parameter in self._trained)

    def _current_version(self) -> tuple[int, int]:
        # Fused optimizers write without a new version of the tensor, so that steps are counted too.
        return sum(parameter._version for parameter in self._adapters), _optimizer_steps().count

    def refresh(self) -> None:
        """Bring what layers compute with up to date with the adapters."""
        if self._adapters and (version := self._current_version()) != self._version:
            for stack in self._stacks:
                for adapters in stack.adapters():
                    copy_adapters(adapters)
            self._version = version


class _StepCounter:
    """How often any optimizer of this process has stepped."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


@functools.cache
def _optimizer_steps() -> _StepCounter:
    """The counter of this process, which counts from the first call on."""
    counter = _StepCounter()
    register_optimizer_step_post_hook(counter)
    return counter
