"""What keeps an accelerated OpenVLA right: it computes with its weights as they are now, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_vla.modules.openvla.blocks import LayerStack
from torchrl_vla.modules.openvla.graphs import ForwardGraphs
from torchrl_vla.modules.openvla.weight_watch import AdapterCopier, WeightWatch
from torchrl_vla.modules.vmap import is_transformed


class Acceleration:
    """Fuses and compiles a model's layers, and runs its functions.

    The copies of the adapters are made anew before every call. Weights are written through ``.data``, from another
    process, through a NumPy array or through a tensor that parameters are views of, and none of this leaves a trace:
    short of reading them all, nothing tells. On a GPU it is one kernel: 0.4 ms on an H200 for the 107 million numbers
    of a 7B model's adapters of rank 32.

    Parameters and layers that were exchanged, and parameters whose memory is another, are noticed in every call too:
    two milliseconds of the host's for a 7B model, which a recording's replay hides. What is in the model for one call
    alone (``torch.func``, TensorDict's ``to_module``) is computed with as it is, without fusing and recordings; what is
    there twice in a row is there to stay, and is taken over.

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
        self.graph_batch_size = graph_batch_size
        self._model, self._stacks = model, stacks
        self._running = False
        self._watch: WeightWatch | None = None
        self._visitors: list[int] = []
        self._copier, self._times_read = AdapterCopier([]), [0] * len(stacks)
        self._graphs: dict[Callable[..., Sequence[Tensor]], ForwardGraphs] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy, in this process or another, has weights of its own.
        return self.__dict__ | {"_watch": None, "_visitors": [], "_copier": AdapterCopier([]), "_graphs": {}}

    def run(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """Call a function of the model.

        Args:
            function: of tensors (or None) to tensors, as :class:`ForwardGraphs` takes it.
            inputs: its arguments.
        """
        if self._running:
            return function(*inputs)  # a part of another one
        self._running = True
        try:
            return self._run(function, inputs)
        finally:
            self._running = False

    def _run(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
        transformed = is_transformed(inputs)
        graphs = self._graphs.get(function)
        if not transformed and graphs is not None and graphs.replays(inputs, self.adapters_off):
            self._copier()
            outputs = graphs(inputs, self.adapters_off)
            # While the GPU works. What was in vain is seldom: a set of weights is exchanged once for many forwards.
            if self._watch is not None and self._watch.exchanged() is None and not self._watch.moved():
                self._visitors = []
                return outputs
        if transformed or not self.refresh():
            with self._without_kept_weights():
                return function(*inputs)
        if function not in self._graphs:
            self._graphs[function] = ForwardGraphs(function, self.graph_batch_size)
        graphs = self._graphs[function]
        return graphs(inputs, self.adapters_off) if graphs.serves(inputs) else function(*inputs)

    @property
    def adapters_off(self) -> bool:
        """Whether the adapters are left out: the one state of the weights that gets recordings of its own."""
        return self._watch is not None and self._watch.adapters_off

    def refresh(self) -> bool:
        """Bring what layers compute with up to date with the weights.

        Returns:
            False if there are other weights in the model than at the last call, perhaps for this one alone.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return True  # whoever replays this has to refresh: a recording reads the copies where they lie
        self._copier()  # first, so that a GPU copies while the rest is looked at
        present = None if self._watch is None else self._watch.exchanged()
        if present is None:
            self._visitors = []
            if self._watch is None or self._watch.moved():
                self.forget_weights()
        elif is_transformed(found for found in present if isinstance(found, Tensor)):
            return False
        elif (visitors := list(map(id, present))) != self._visitors:
            self._visitors = visitors
            return False
        else:
            self.forget_weights()
        if self._watch is None:
            if is_transformed(self._model.parameters()):
                return False
            self._watch = WeightWatch(self._model)
        for stack in self._stacks:
            stack.weights()
        if (times_read := [stack.times_read for stack in self._stacks]) != self._times_read:
            self._copier = AdapterCopier([one for stack in self._stacks for one in stack.adapters()])
            self._times_read = times_read
        return True

    def forget_weights(self) -> None:
        """Read the layers anew, after their weights or adapters have become others than those they had."""
        for stack in self._stacks:
            stack.forget_weights()
        self._watch, self._visitors, self._copier = None, [], AdapterCopier([])
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Give the memory of recorded calls back; the next one of each shape is recorded again."""
        self._graphs.clear()

    @contextmanager
    def _without_kept_weights(self) -> Iterator[None]:
        with ExitStack() as contexts:
            for stack in self._stacks:
                contexts.enter_context(stack.without_kept_weights())
            yield
