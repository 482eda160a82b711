"""How many decisions go through the network at once: as given, or as the GPU's memory allows, measured once."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

__all__ = ["MicroBatch", "MicroBatchCost"]

_CPU_SIZE = 32
_SIZES = (32, 24, 16, 12, 8, 4, 2, 1)
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Share of the memory that is left for fragmentation and small tensors, and the least: an update of a 7B model took
#: 0.8 GiB more from an H100 than its parts had when they were measured, and 1.3 of 67 GiB with large micro-batches.
_MARGIN = 0.04
_LEAST_MARGIN = 2**30


class MicroBatchCost(NamedTuple):
    """One forward and backward pass: its time in seconds, and the memory that it needs for the while in bytes."""

    seconds: float
    bytes: int


class MicroBatch:
    """The size of a micro-batch and the share of layers recomputed in the backward pass.

    Neither changes the gradient: they trade memory for time.

    Args:
        size: decisions per forward and backward pass; ``"auto"`` measures which is fastest.
        recompute: share of the layers whose activations are computed again, 0 to 1; ``"auto"`` as little as memory
            asks for.
        memory_gb: memory that may be filled, in GiB; None: all that is free. What PyTorch reserves counts, not CUDA's
            own context. Trying sizes may take more for a moment.
        set_recompute: how the policy is told the share; None for one that cannot recompute.

    Examples:
        >>> micro_batch = MicroBatch(8)
        >>> micro_batch.halve(), micro_batch.size
        (True, 4)
    """

    def __init__(
        self,
        size: int | Literal["auto"],
        recompute: float | Literal["auto"] = 0.0,
        *,
        memory_gb: float | None = None,
        set_recompute: Callable[[float], None] | None = None,
    ) -> None:
        self.size = 1 if size == "auto" else size
        self.recompute = 0.0
        self.memory_gb = memory_gb
        self.costs: dict[tuple[int, float], MicroBatchCost] = {}
        if recompute == "auto" and set_recompute is None:
            recompute = 0.0
        self._sizes = _SIZES if size == "auto" else (size,)
        self._shares = _SHARES if recompute == "auto" else (recompute,)
        self._auto_size = size == "auto"
        self._set_recompute = set_recompute
        self._release: Callable[[], None] = lambda: None
        self.chosen = len(self._sizes) == len(self._shares) == 1
        self._recompute(self._shares[0])

    def halve(self) -> bool:
        """Take half of the size, after memory ran out; False if one decision is too much already."""
        if self.size == 1:
            return False
        self.size //= 2
        return True

    def rows(self, decisions: int, parts: int = 1) -> int:
        """Decisions of each pass over a mini-batch, in passes of one size as far as can be.

        Even where it may be: mini-batches of similar sizes then share recorded passes.

        Args:
            decisions: of the mini-batch.
            parts: least number of passes.

        Examples:
            >>> MicroBatch(24).rows(32), MicroBatch(24).rows(200)
            (16, 24)
        """
        most = min(self.size, math.ceil(decisions / parts))
        equal = math.ceil(decisions / math.ceil(decisions / most))
        return min(most, equal + equal % 2)

    def choose(
        self,
        run: Callable[[int], Any],
        device: torch.device,
        *,
        decisions: int = 0,
        reserve: int = 0,
        release: Callable[[], None] | None = None,
    ) -> str:
        """Measure, and decide.

        Args:
            run: a forward and backward pass over so many decisions.
            device: where it runs; only a GPU is measured.
            decisions: of a mini-batch; what counts is the time of all its passes.
            reserve: bytes that are not allocated yet and will be, such as the optimizer's.
            release: gives back what a pass keeps for the next one of its size.

        Returns:
            What was decided, and why, in a sentence.
        """
        self.chosen = True
        if device.type != "cuda":
            self.size = _CPU_SIZE if self._auto_size else self.size
            return f"Micro-batches of {self.size} decisions."
        self._release = release or self._release
        self._recompute(max(self._shares))  # what needs least memory
        run(2)  # compiles, and allocates the gradients
        # What is still reserved after this belongs to the weights and to recorded rollouts.
        self._release()
        free_memory()
        reserved = torch.cuda.memory_reserved(device)
        limit = torch.cuda.mem_get_info(device)[0] + reserved
        if self.memory_gb is not None:
            limit = min(limit, int(self.memory_gb * 2**30))
        budget = limit - reserved - reserve - max(int(_MARGIN * limit), _LEAST_MARGIN)
        self._measure_fitting(run, device, budget)
        # A first mini-batch of few decisions says little about those to come.
        decisions = max(decisions, _SIZES[0])
        best = min(
            self.costs,
            key=lambda candidate: self.costs[candidate].seconds * math.ceil(decisions / candidate[0]),
            default=(min(self._sizes), max(self._shares)),
        )
        self._release()
        self.size = best[0]
        self._recompute(best[1])
        figures = f": there is nothing less, and it may take more than {limit / 2**30:.1f} GiB"
        if (cost := self.costs.get(best)) is not None:
            figures = (
                f": {cost.seconds / best[0] * 1e3:.1f} ms per decision, {(limit - budget + cost.bytes) / 2**30:.1f} of "
                f"{limit / 2**30:.1f} GiB"
            )
        return f"Micro-batches of {best[0]} decisions, {best[1]:.0%} of the layers recomputed{figures}."

    def _measure_fitting(self, run: Callable[[int], Any], device: torch.device, budget: int) -> None:
        """Costs of each size with the least share that fits: looked for on a line through two measured sizes."""
        lines = {}
        for share in {min(self._shares), max(self._shares)}:
            small, large = (self._measure(run, device, size, share) for size in (2, 4))
            if small is not None and large is not None:
                slope = (large.bytes - small.bytes) / 2
                lines[share] = (slope, small.bytes - 2 * slope)
        for size in self._sizes:
            if size == 1 and self.costs:
                continue  # never faster than several, and compiled by itself
            for share in self._shares:
                needed = _interpolate(lines, share, size)
                if needed is None or needed > budget:
                    continue
                cost = self._measure(run, device, size, share)
                if cost is not None and cost.bytes <= budget:
                    self.costs[size, share] = cost
                    break

    def _measure(
        self, run: Callable[[int], Any], device: torch.device, size: int, share: float
    ) -> MicroBatchCost | None:
        """Time of one pass, and the memory that it takes from the card; None if memory runs out."""
        self._release()
        self._recompute(share)
        free_memory()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        try:
            run(size)
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            run(size)
            torch.cuda.synchronize(device)
            return MicroBatchCost(time.perf_counter() - started, torch.cuda.max_memory_reserved(device) - before)
        except torch.OutOfMemoryError:
            return None

    def _recompute(self, share: float) -> None:
        self.recompute = share
        if self._set_recompute is not None:
            self._set_recompute(share)


def _interpolate(lines: dict[float, tuple[float, float]], share: float, size: int) -> float | None:
    """Bytes of a micro-batch: lines (bytes per decision, bytes besides) at known shares, linear between them."""
    if not lines:
        return None
    low, high = min(lines), max(lines)
    if share < low:
        return math.inf
    weight = 0.0 if high == low else (share - low) / (high - low)
    at_low, at_high = (slope * size + besides for slope, besides in (lines[low], lines[high]))
    return (1 - weight) * at_low + weight * at_high


def trim_heap() -> None:
    """Give back what the C library keeps of freed images between those that live; elsewhere than with glibc, nothing.

    An update from 16 episodes on a CPU left 0.7 GB so; in ten from 60 episodes the process grew by 1.6 GB.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_memory() -> None:
    """Give back what a pass that ran out of memory left behind; not for a loop that works."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
