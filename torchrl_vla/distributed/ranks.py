"""The processes that train together, and what they say to each other; one process says nothing and waits for nobody."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrl_vla.errors import UserError

__all__ = ["ALONE", "OneProcess", "Ranks", "join_ranks"]

T = TypeVar("T")

#: Longer than any rank works alone: a rollout of full-horizon episodes, or writing a 7B checkpoint.
_TIMEOUT = timedelta(minutes=30)


class OneProcess:
    """A process that trains alone: all shares are whole, and nothing is sent.

    Examples:
        >>> ranks = OneProcess()
        >>> ranks.share([1, 2, 3]), ranks.sum(5), ranks.gather("figures")
        ([1, 2, 3], 5, ['figures'])
    """

    rank, size, local_rank = 0, 1, 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes what a run writes once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of what all hold in the same order: every `size`-th, from its own number on."""
        return items if self.size == 1 else [items[index] for index in range(self.rank, len(items), self.size)]

    def sum(self, number: int) -> int:
        """Return the sum of every process's number."""
        return number

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one message for those of one dtype."""

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank; small things, which are pickled."""
        return [value]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the processes' gradients, one flat tensor, one message; a process without any adds zeros."""


#: What a part that knows nothing of processes is made with.
ALONE = OneProcess()


class Ranks(OneProcess):
    """One of the processes of a torch.distributed group.

    Args:
        device: where tensors are exchanged: the process's GPU with NCCL, the CPU with gloo.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = device

    def sum(self, number: int) -> int:
        """Return the sum of every process's number."""
        total = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return int(total)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place; one exchange for each dtype."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for alike in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1).to(self.device) for tensor in alike])
            dist.all_reduce(flat)
            for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of the processes."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their sums over all processes; a missing one counts as zero."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # In place: recorded passes add to these very tensors.
        self.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])


@contextmanager
def join_ranks(device: str = "auto", timeout: timedelta = _TIMEOUT) -> Iterator[OneProcess]:
    """Join the processes that torchrun has started beside this one, or be the only one.

    Args:
        device: what the run was told to compute on; ``"auto"`` takes each process its own GPU where there are some.
        timeout: after which a process that waits for others gives up; those of a rank that was killed end then, too.

    Raises:
        ValueError: more processes on a machine than it has GPUs.

    Examples:
        >>> with join_ranks() as ranks:  # not under torchrun
        ...     ranks.size
        1
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield OneProcess()
        return
    on_gpus, local = device != "cpu" and torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpus and local >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started process {local} on a machine with {torch.cuda.device_count()} GPUs: give "
            "--nproc-per-node at most as many, or --device cpu."
        )
    own = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(own)
    # A store of each attempt: what a restarted group looks up must not be the addresses of the one before it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size=size, is_master=_hosts_the_store(rank),
        timeout=timeout, multi_tenant=True,
    )  # fmt: skip
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", store=dist.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=size,
        timeout=timeout,
    )  # fmt: skip
    try:
        yield Ranks(own)
    finally:
        dist.destroy_process_group()


def _hosts_the_store(rank: int) -> bool:
    """Return whether this process holds the store: torchrun's agent has it already, else the first one does."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
