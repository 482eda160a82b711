"""Reductions over the valid entries of a batch, without host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """Broadcast a validity mask over the trailing dimensions it does not have.

    Args:
        mask: bool, a prefix of ``shape`` (a trailing singleton broadcasts): ``[B]``, ``[B, 1]``, ``[B, K]``...
        shape: the shape to mask, such as ``[B, K, 7]``.

    Raises:
        ValueError: if the mask does not broadcast to ``shape``.

    Examples:
        >>> expand_mask(torch.tensor([[True, False]]), torch.Size([1, 2, 3])).sum(-1)
        tensor([[3, 0]])
    """
    while mask.ndim > len(shape) and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    padded = mask.bool().reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim))
    try:
        return padded.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"A mask of shape {tuple(mask.shape)} does not fit values of shape {tuple(shape)}: "
            "give one entry per decision ([B]), per control step ([B, K]) or per token ([B, K, 7])."
        ) from error


def zero_invalid(values: Tensor, valid: Tensor) -> Tensor:
    """Zero the invalid entries, and with them their gradient, whatever they hold (NaN and infinity included)."""
    return torch.where(valid, values, torch.zeros_like(values))


def masked_mean(values: Tensor, valid: Tensor, count: Tensor | None = None) -> Tensor:
    """Sum the valid entries and divide by ``count``, by default their own number (0 if there is none)."""
    total = zero_invalid(values, valid).sum()
    return total / (valid.sum() if count is None else count).clamp_min(1)


def effective_sample_size(log_weights: Tensor, valid: Tensor) -> Tensor:
    """Kish's effective sample size of the valid entries, as a fraction of their number (0 if there is none).

    Source: Kish, Survey Sampling (1965): ``(sum w)^2 / (n sum w^2)``.
    """
    # Subtracting the maximum keeps the squares finite; it cancels in the quotient.
    largest = log_weights.masked_fill(~valid, -torch.inf).amax().nan_to_num(neginf=0.0)
    weights = zero_invalid((log_weights - largest).exp(), valid)
    return weights.sum().square() / (weights.square().sum() * valid.sum()).clamp_min(torch.finfo(weights.dtype).tiny)
