"""Recorded work: small batches' launches cost more than their arithmetic, so a GPU replays them as one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_WARM_UPS = 2  # compilation and autotuning happen before the recording
_STEP = 4  # of batch sizes above it: each recording takes a second of a 7B model, and rollouts come in every size

T = TypeVar("T")


class GraphRecorder:
    """Records what functions launch on a GPU.

    All its recordings share one pool of memory, so that a replay overwrites what the one before left: copy results
    before the next.

    Reference: `CUDA graphs <https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/>`_.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Run a function a few times, then record it.

        Args:
            function: neither reads values back nor depends on anything but the contents of tensors that stay in place.

        Returns:
            What replays it, and its results, which every replay writes anew.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream, current = _recording_stream(torch.cuda.current_device()), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            results = function()
        return graph.replay, results

    def clear(self) -> None:
        """Begin a new pool; the old one's memory is free once its recordings are gone."""
        self._pool = None


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """Return the stream that everything is warmed up and recorded on.

    Gradients are added up on the stream where a parameter was first used, which must be the recording's; and each
    stream has workspaces of its own, which stay.
    """
    return torch.cuda.Stream(device)


class _Recording(NamedTuple):
    replay: Callable[[], None]
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]


class ForwardGraphs:
    """Records a forward per shape of its inputs and replays it; a few sizes of batches serve all, filled up.

    Args:
        forward: a function of tensors (or None) to tensors, sample by sample, that neither reads values back nor
            changes its shapes.
        max_batch_size: larger batches are not recorded.
    """

    def __init__(self, forward: Callable[..., Sequence[Tensor]], max_batch_size: int) -> None:
        self.forward = forward
        self.max_batch_size = max_batch_size
        self._recordings: dict[Hashable, _Recording] = {}
        self._recorder = GraphRecorder()

    def clear(self) -> None:
        """Forget the recordings and give their memory back."""
        self._recordings.clear()
        self._recorder.clear()

    def serves(self, inputs: Sequence[Tensor | None]) -> bool:
        """Whether these inputs can be replayed: on a GPU, without gradient, few enough, and not in a recording."""
        given = [tensor for tensor in inputs if tensor is not None]
        return (
            not torch.is_grad_enabled()
            and all(tensor.is_cuda for tensor in given)
            and len(given[0]) <= self.max_batch_size
            and not torch.cuda.is_current_stream_capturing()
        )

    def replays(self, inputs: Sequence[Tensor | None], state: Hashable) -> bool:
        """Whether a call with these arguments records nothing."""
        return self.serves(inputs) and self._key(inputs, state) in self._recordings

    def _key(self, inputs: Sequence[Tensor | None], state: Hashable) -> tuple[Hashable, ...]:
        shapes = (None if x is None else (x.shape[1:], x.ndim, x.dtype) for x in inputs)
        return (state, self._size(inputs), *shapes)

    def _size(self, inputs: Sequence[Tensor | None]) -> int:
        """Return how many samples the recording has that serves these."""
        samples = next(len(x) for x in inputs if x is not None)
        return samples if samples <= _STEP else min(math.ceil(samples / _STEP) * _STEP, self.max_batch_size)

    def __call__(self, inputs: Sequence[Tensor | None], state: Hashable) -> tuple[Tensor, ...]:
        """Run the forward.

        Args:
            inputs: its arguments.
            state: whatever else its result depends on; each state gets recordings of its own.
        """
        samples = next(len(x) for x in inputs if x is not None)
        key = self._key(inputs, state)
        if key not in self._recordings:
            # Filled up with copies of the last sample; at a replay, with what an earlier batch left there.
            rows = torch.arange(self._size(inputs)).clamp_max(samples - 1)
            self._recordings[key] = self._record([x if x is None or x.ndim == 0 else x[rows] for x in inputs])
        recording = self._recordings[key]
        for target, source in zip(recording.inputs, inputs, strict=True):
            if target is not None and source is not None:
                (target[:samples] if source.ndim else target).copy_(source)
        recording.replay()
        return tuple(output[:samples].clone() for output in recording.outputs)

    def _record(self, inputs: Sequence[Any]) -> _Recording:
        static = tuple(None if x is None else x.clone() for x in inputs)
        replay, outputs = self._recorder.record(lambda: tuple(self.forward(*static)))
        return _Recording(replay, static, outputs)
