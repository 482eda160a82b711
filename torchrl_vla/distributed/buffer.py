"""One update's decisions, spread over processes: scored together, sampled together, each process learning its own."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase, is_non_tensor
from torch import Tensor
from torchrl.envs.transforms import Transform

from torchrl_vla.distributed.ranks import OneProcess

__all__ = ["SharedBuffer"]

#: Bytes of one decision's entry up to which it goes to all processes: log-probabilities and tokens do, images do not.
_SMALL = 8192
_ROW = "row_of_all"


class SharedBuffer:
    """What the processes' replay buffers would be together, with this process's decisions in it.

    ``extend`` sends everything but the images around, so that every process scores all episodes, in the order in which
    one process would have collected them: groups are whole wherever their episodes ran, and the transform counts what
    it counts in one process. ``sample`` draws the same mini-batch everywhere, from the same random numbers, and returns
    this process's decisions of it, which can be none.

    Args:
        transform: scores the decisions and may drop some, such as :class:`~torchrl_vla.objectives.GRPOAdvantage`.
        others: transforms that then work on each process's own decisions, images included.

    Keyword Args:
        ranks: the processes.
    """

    def __init__(self, transform: Transform, *others: Transform, ranks: OneProcess) -> None:
        self.transform, self.others, self.ranks = transform, others, ranks
        self.empty()

    def __len__(self) -> int:
        """Return the decisions of all processes."""
        return len(self._place)

    def empty(self) -> None:
        """Forget all decisions."""
        self._place, self._order = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        self._data: TensorDictBase | None = None

    def extend(self, data: TensorDictBase) -> None:
        """Score the decisions of all processes, and keep this one's of those that teach something.

        Args:
            data: this process's decisions ``[T]``, episode after episode, with ``("collector", "traj_ids")`` as one
                process would have numbered the episodes; ``T`` may be 0.
        """
        self.empty()
        parts = self.ranks.gather(_small_entries(data))
        shape = next(part for part in parts if len(part))
        parts = [part if len(part) else shape[:0] for part in parts]
        owner = torch.cat([torch.full((len(part),), rank) for rank, part in enumerate(parts)])
        local = torch.cat([torch.arange(len(part)) for part in parts])
        everything = TensorDict.cat(parts)
        order = everything["collector", "traj_ids"].reshape(-1).argsort(stable=True)
        everything, owner, local = everything[order], owner[order], local[order]
        scored = self.transform.inv(everything.set(_ROW, torch.arange(len(everything))))
        if scored is None:
            return
        row = scored[_ROW]
        mine = owner[row] == self.ranks.rank
        #: Where each decision of all processes lies in this one's data; -1 for those of others.
        self._place = torch.where(mine, mine.cumsum(0) - 1, -1)
        kept = data[local[row][mine]]
        self._data = kept.update(scored[mine].exclude(_ROW))
        for other in self.others:
            self._data = other.inv(self._data)

    def sample(self, batch_size: int) -> TensorDictBase:
        """Return this process's decisions of the next mini-batch of all, each of which is drawn once before any again.

        Args:
            batch_size: decisions of all processes.
        """
        assert self._data is not None
        if not len(self._order):
            self._order = torch.randperm(len(self))
        drawn, self._order = self._order[:batch_size], self._order[batch_size:]
        if not len(self._order):  # at once, as TorchRL's sampler does: the random numbers after it are the same then
            self._order = torch.randperm(len(self))
        place = self._place[drawn]
        return self._data[place[place >= 0]]


def _small_entries(data: TensorDictBase) -> TensorDict:
    """Return what an advantage may read, in copies: every tensor but large ones, no texts."""
    small: dict = {}
    for key, value in data.items(include_nested=True, leaves_only=True):
        if isinstance(value, Tensor) and not is_non_tensor(value):
            size = value[0].nbytes if len(value) else 0
            if size <= _SMALL:
                small[key] = value.cpu().clone()
    return TensorDict(small, data.batch_size)
