"""Weights that are numbers: checked as they are loaded, or on their own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from torchrl_vla.errors import UserError

__all__ = ["require_finite", "require_finite_files"]


def require_finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Refuse weights with NaN or infinity: a policy with one acts by its first token, whatever it sees.

    Args:
        tensor: weights of any shape.
        name: what they are called, for the message.
        path: file that they are of, for the message.

    Returns:
        The same tensor.

    Raises:
        ValueError: one of them is not finite in the tensor's dtype, or they are no real numbers.

    Examples:
        >>> require_finite(torch.ones(2), "bias", Path("model.safetensors"))
        tensor([1., 1.])
    """
    if not tensor.is_floating_point():
        raise UserError(f"{name} in {path} is stored as {tensor.dtype}, and weights are floating-point numbers.")
    # A sum allocates nothing, and one number of it that is not finite makes it so; it may overflow by itself.
    if not tensor.is_meta and not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise UserError(
            f"{name} in {path} has {count:,} of {tensor.numel():,} numbers that are NaN or infinite in {tensor.dtype}: "
            "the weights are damaged, or a training that diverged wrote them. Take another checkpoint."
        )
    return tensor


def require_finite_files(shards: Iterable[Path], heads: Iterable[Path]) -> None:
    """Refuse a checkpoint with NaN or infinite weights, one tensor in memory at a time.

    Args:
        shards: safetensors files.
        heads: PyTorch files, state dicts of tensors.

    Raises:
        ValueError: a weight is not finite.
    """
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                require_finite(shard.get_tensor(name), name, path)
    for path in heads:
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
            require_finite(tensor, name, path)
