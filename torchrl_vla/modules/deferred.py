"""Checks of numbers that a GPU computes, without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_vla.errors import UserError

Describe = Callable[[list[int]], Exception]
"""The rows that are wrong, to the error that says so."""


class NonFiniteError(UserError):
    """A number that a policy reads or decides by is NaN or infinite."""


class _Pending(NamedTuple):
    wrong: Tensor
    copied: torch.cuda.Event
    describe: Describe


class DeferredErrors:
    """Raises what is wrong with a batch: at once on the CPU, as soon as it is known on a GPU.

    There the answer travels to the host beside the work. By the time of the next decision it has arrived, as the host
    has waited for the actions of this one.

    Examples:
        >>> errors = DeferredErrors()
        >>> errors.check(torch.tensor([1.0, 2.0]).isnan(), lambda rows: NonFiniteError(f"rows {rows} are NaN"))
        >>> errors.check(torch.tensor([1.0, torch.nan]).isnan(), lambda rows: NonFiniteError(f"rows {rows} are NaN"))
        Traceback (most recent call last):
        torchrl_vla.modules.deferred.NonFiniteError: rows [1] are NaN
    """

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    def __getstate__(self) -> dict[str, Any]:
        return {"_pending": deque()}

    def check(self, wrong: Tensor, describe: Describe) -> None:
        """Raise an error if a row is wrong, or raise it later.

        Args:
            wrong: bool [B], on any device.
            describe: makes the error.
        """
        if wrong.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return
            arrived = torch.empty(wrong.shape, dtype=torch.bool, pin_memory=True)
            arrived.copy_(wrong, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._pending.append(_Pending(arrived, copied, describe))
        elif bool(wrong.any()):
            raise describe(wrong.nonzero().flatten().tolist())

    def raise_known(self, *, wait: bool = False) -> None:
        """Raise the error of an earlier check whose answer has arrived.

        Args:
            wait: for the answers that have not; after the last decision there is no next one to raise them.
        """
        while self._pending and (wait or self._pending[0].copied.query()):
            wrong, copied, describe = self._pending.popleft()
            copied.synchronize()
            if bool(wrong.any()):
                self._pending.clear()  # of the same decision, or one that followed from it
                raise describe(wrong.nonzero().flatten().tolist())
