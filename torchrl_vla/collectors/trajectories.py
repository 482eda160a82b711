"""Records decisions as they are taken, and puts them in the order of their episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase, is_leaf_nontensor, is_non_tensor
from tensordict.utils import NestedKey
from torch import Tensor

__all__ = ["TrajectoryRecorder", "non_tensor", "non_tensor_leaves"]


def non_tensor_leaves(tensordict: TensorDictBase) -> dict[NestedKey, list[Any]]:
    """Return what a TensorDict ``[N]`` holds beside tensors, such as instructions: lists of N, by key."""
    leaves: dict[NestedKey, list[Any]] = {}
    for key, value in tensordict.items(True, True, is_leaf=is_leaf_nontensor):
        if is_non_tensor(value):
            shared = isinstance(value, NonTensorData)
            leaves[key] = [value.data] * tensordict.batch_size[0] if shared else value.tolist()
    return leaves


def non_tensor(values: Sequence[Any]) -> NonTensorData | NonTensorStack:
    """One value per row, ``[N]``; kept once where all are equal, which is much faster to index."""
    if all(value == values[0] for value in values):
        return NonTensorData(values[0], batch_size=[len(values)])
    return NonTensorStack(*values)


class TrajectoryRecorder:
    """Takes one decision of each running episode at a time; gives whole episodes, one after the other.

    Decisions are kept as they come and placed once at the end, and each is freed as soon as it has its place: the
    memory in use stays below twice the result.

    Args:
        num_episodes: how many episodes there are; they are numbered from 0.

    Examples:
        >>> recorder = TrajectoryRecorder(2)
        >>> recorder.append(torch.tensor([0, 1]), TensorDict({"x": torch.tensor([0, 10])}, [2]))
        >>> recorder.append(torch.tensor([0]), TensorDict({"x": torch.tensor([1])}, [1]))
        >>> recorder.finish()["x"]
        tensor([ 0,  1, 10])
    """

    def __init__(self, num_episodes: int) -> None:
        self.lengths = torch.zeros(num_episodes, dtype=torch.int64)
        self._rows: list[tuple[Tensor, Tensor, TensorDictBase]] = []

    def append(self, episodes: Tensor, decisions: TensorDictBase) -> None:
        """Record the next decision of some episodes.

        Args:
            episodes: int64 ``[n]``, distinct.
            decisions: ``[n]``, with the same entries every time, not changed by anyone afterwards.
        """
        self._rows.append((episodes, self.lengths[episodes], decisions))
        self.lengths[episodes] += 1

    def discard(self, episodes: Tensor) -> None:
        """Forget the decisions of some episodes, int64 ``[n]``, which start again."""
        rows = []
        for recorded, steps, decisions in self._rows:
            kept = ~torch.isin(recorded, episodes)
            rows.append((recorded, steps, decisions) if kept.all() else (recorded[kept], steps[kept], decisions[kept]))
        self._rows = rows
        self.lengths[episodes] = 0

    def finish(self) -> TensorDict:
        """Return all decisions, ``[T]``, ordered by episode and time; the recorder is empty afterwards."""
        total = int(self.lengths.sum())
        starts = self.lengths.cumsum(0) - self.lengths
        tensors: dict[NestedKey, Tensor] = {}
        others: dict[NestedKey, list[Any]] = {}
        self._rows.reverse()
        while self._rows:
            episodes, steps, decisions = self._rows.pop()
            place = starts[episodes] + steps
            for key, rows in decisions.items(True, True):
                if key not in tensors:
                    tensors[key] = torch.empty(total, *rows.shape[1:], dtype=rows.dtype)
                tensors[key][place] = rows
            for key, values in non_tensor_leaves(decisions).items():
                column = others.setdefault(key, [None] * total)
                for index, value in zip(place.tolist(), values, strict=True):
                    column[index] = value
        data = TensorDict({}, [total])
        for key, rows in tensors.items():
            data.set(key, rows)
        for key, column in others.items():
            data.set(key, non_tensor(column))
        return data
