"""Recorded forwards: a small batch's launches cost more than its arithmetic, so a GPU replays them as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WARM_UPS = 2  # compilation and autotuning happen before the recording


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]


class ForwardGraphs:
    """Records a forward per shape of its inputs and replays it.

    Args:
        forward: a function of tensors (or None) to tensors that neither reads values back nor changes its shapes.
        max_batch_size: larger batches are not recorded.

    Reference: `CUDA graphs <https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/>`_.
    """

    def __init__(self, forward: Callable[..., Sequence[Tensor]], max_batch_size: int) -> None:
        self.forward = forward
        self.max_batch_size = max_batch_size
        self._recordings: dict[Hashable, _Recording] = {}
        # One pool of memory for all: a replay's outputs are copied before the next one overwrites them.
        self._pool: Any = None

    def clear(self) -> None:
        """Forget the recordings and give their memory back."""
        self._recordings.clear()
        self._pool = None

    def serves(self, inputs: Sequence[Tensor | None]) -> bool:
        """Whether these inputs can be replayed: on a GPU, without gradient, few enough, and not in a recording."""
        given = [tensor for tensor in inputs if tensor is not None]
        return (
            not torch.is_grad_enabled()
            and all(tensor.is_cuda for tensor in given)
            and len(given[0]) <= self.max_batch_size
            and not torch.cuda.is_current_stream_capturing()
        )

    def __call__(self, inputs: Sequence[Tensor | None], state: Hashable) -> tuple[Tensor, ...]:
        """Run the forward.

        Args:
            inputs: its arguments.
            state: whatever else its result depends on; each state gets recordings of its own.
        """
        key = (state, *(None if x is None else (tuple(x.shape), x.dtype) for x in inputs))
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs)
        recording = self._recordings[key]
        for target, source in zip(recording.inputs, inputs, strict=True):
            if target is not None and source is not None:
                target.copy_(source)
        recording.graph.replay()
        return tuple(output.clone() for output in recording.outputs)

    def _record(self, inputs: Sequence[Any]) -> _Recording:
        static = tuple(None if x is None else x.clone() for x in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self.forward(*static)
        torch.cuda.current_stream().wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = tuple(self.forward(*static))
        return _Recording(graph, static, outputs)
