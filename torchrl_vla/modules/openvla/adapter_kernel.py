"""One kernel for all copies of adapters: thousands of small ones would take longer to launch than to run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchrl_vla.modules.openvla.linear import AdapterCopy

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without
    triton = tl = None

_BLOCK = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _copy_tile(table, scales, SOURCE: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tile = tl.program_id(0)
    row = table + tile * 6
    source = tl.load(row).to(tl.pointer_type(SOURCE))
    target = tl.load(row + 1).to(tl.pointer_type(TARGET))
    index = tl.load(row + 2).to(tl.int32) + tl.arange(0, BLOCK)
    inside = index < tl.load(row + 3).to(tl.int32)
    columns, stride = tl.load(row + 4).to(tl.int32), tl.load(row + 5)
    # Rounded where the product of a tensor and a number is, then where it is copied.
    values = (tl.load(source + index, mask=inside).to(tl.float32) * tl.load(scales + tile)).to(SOURCE)
    tl.store(target + (index // columns) * stride + index % columns, values.to(TARGET), mask=inside)


def fuse_copies(copies: Sequence[AdapterCopy]) -> Callable[[], None] | None:
    """Return what makes all the copies by a launch per pair of dtypes.

    Args:
        copies: they are made anew, by another call of this, once a tensor lies elsewhere.

    Returns:
        None if the kernel cannot serve all of them: there is no Triton, a tensor is not on a GPU or of another dtype,
        or a source's numbers do not lie one after the other.
    """
    if triton is None or not copies:
        return None
    groups: dict[tuple[torch.dtype, torch.dtype], list[AdapterCopy]] = {}
    for copy in copies:
        there = copy.source.is_cuda and copy.target.is_cuda and copy.source.is_contiguous()
        served = copy.source.dtype in _DTYPES and copy.target.dtype in _DTYPES and copy.target.stride(1) == 1
        if not there or not served or copy.source.numel() >= 2**31 - _BLOCK:
            return None
        groups.setdefault((copy.source.dtype, copy.target.dtype), []).append(copy)
    launches = [_plan(group, source, target) for (source, target), group in groups.items()]

    def run() -> None:
        for launch in launches:
            launch()

    return run


@functools.cache
def _kernel() -> Any:
    return triton.jit(_copy_tile)


def _plan(copies: Sequence[AdapterCopy], source: torch.dtype, target: torch.dtype) -> Callable[[], None]:
    rows, scales = [], []
    for copy in copies:
        size, (_, columns) = copy.source.numel(), copy.source.shape
        for first in range(0, size, _BLOCK):
            addresses = copy.source.data_ptr(), copy.target.data_ptr()
            rows.append((*addresses, first, size, columns, copy.target.stride(0)))
            scales.append(copy.scale)
    device = copies[0].target.device
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    factors = torch.tensor(scales, dtype=torch.float32).to(device)
    # Triton's names are PyTorch's.
    types = [getattr(tl, str(dtype).removeprefix("torch.")) for dtype in (source, target)]
    return lambda: _kernel()[(len(rows),)](table, factors, *types, _BLOCK)
