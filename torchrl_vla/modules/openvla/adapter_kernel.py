"""One kernel for all copies of adapters: thousands of small ones would take longer to launch than to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from torchrl_vla.modules.openvla.linear import AdapterCopy

_BLOCK = 4096
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
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
    """What makes all the copies by a launch per pair of dtypes.

    Args:
        copies: on one GPU; the tensors have to stay where they are.

    Returns:
        None if the kernel cannot serve one of them: the source's rows are not side by side, or a dtype is another.
    """
    groups: dict[tuple[torch.dtype, torch.dtype], list[AdapterCopy]] = {}
    for copy in copies:
        served = copy.source.dtype in _TYPES and copy.target.dtype in _TYPES and copy.source.is_contiguous()
        if not served or copy.target.stride(1) != 1 or copy.source.numel() >= 2**31 - _BLOCK:
            return None
        groups.setdefault((copy.source.dtype, copy.target.dtype), []).append(copy)
    launches = [_plan(group, _TYPES[source], _TYPES[target]) for (source, target), group in groups.items()]

    def run() -> None:
        for launch in launches:
            launch()

    return run


def _plan(copies: Sequence[AdapterCopy], source: tl.dtype, target: tl.dtype) -> Callable[[], None]:
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
    return lambda: _copy_tile[(len(rows),)](table, factors, source, target, _BLOCK)
