"""Which entries of a batch count, and reductions over them, without host synchronisation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vla.errors import UserError


def expand_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """Broadcast a validity mask over the trailing dimensions it does not have.

    Args:
        mask: bool, a prefix of ``shape`` (a trailing singleton broadcasts): ``[B]``, ``[B, 1]``, ``[B, K]``... Of
            dimensions that the shape does not have, any valid entry makes the whole valid.
        shape: the shape to mask, such as ``[B, K, 7]``.

    Raises:
        ValueError: if the mask does not broadcast to ``shape``.

    Examples:
        >>> expand_mask(torch.tensor([[True, False]]), torch.Size([1, 2, 3])).sum(-1)
        tensor([[3, 0]])
    """
    while mask.ndim > len(shape):
        mask = mask.any(-1)
    padded = mask.bool().reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim))
    try:
        return padded.expand(shape)
    except RuntimeError as error:
        raise UserError(
            f"A mask of shape {tuple(mask.shape)} does not fit values of shape {tuple(shape)}: "
            "give one entry per decision ([B]), per control step ([B, K]) or per token ([B, K, 7])."
        ) from error


def executed_actions(num_control_steps: Tensor, shape: torch.Size) -> Tensor:
    """Say which actions of each chunk were executed; an episode may end inside a chunk.

    Args:
        num_control_steps: int64 ``[*B, 1]``, how many of a chunk's actions the environment ran.
        shape: ``[*B, K, ...]`` with one entry per action after the batch's dimensions, or ``[*B]``, where a decision
            counts if any of its actions ran.

    Returns:
        bool, of that shape.

    Examples:
        >>> executed_actions(torch.tensor([[2], [3]]), torch.Size([2, 3]))
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """
    batch_dims = num_control_steps.ndim - 1
    if len(shape) <= batch_dims:
        return expand_mask(num_control_steps > 0, shape)
    steps = torch.arange(shape[batch_dims], device=num_control_steps.device)
    return expand_mask(steps < num_control_steps, shape)


def valid_entries(
    tensordict: TensorDictBase,
    shape: torch.Size,
    *,
    masks: Iterable[NestedKey],
    num_control_steps: NestedKey,
    device: torch.device | None = None,
) -> Tensor:
    """Combine what a batch says about which of its entries count; without anything said, all do.

    Args:
        tensordict: the batch ``[*B]``.
        shape: of the entries, such as ``[*B, K, 7]``.
        masks: names of bool entries, each ``[*B]``, ``[*B, 1]``, ``[*B, K]`` or ``[*B, K, 7]``, where the batch has
            them.
        num_control_steps: name of the int64 entry ``[*B, 1]`` with the number of executed actions, where it has one.
        device: of the result.

    Returns:
        bool, of that shape: the AND of all of them.

    Raises:
        ValueError: if one of them does not broadcast to ``shape``.
    """
    valid = torch.ones((), dtype=torch.bool, device=device).expand(shape)
    for key in set(masks):
        mask = tensordict.get(key, None)
        if mask is not None:
            valid = valid & expand_mask(mask, shape)
    steps = tensordict.get(num_control_steps, None)
    return valid if steps is None else valid & executed_actions(steps, shape)


def one_batch_size(tensordict: TensorDictBase) -> TensorDictBase:
    """Copy a batch, not its tensors, with the nested entries' batch size that of the whole.

    A call with keywords (``dispatch``) gives a nested entry as many batch dimensions as its tensors share.
    """
    tensordict = tensordict.clone(False)
    for value in list(tensordict.values(True)):
        if isinstance(value, TensorDictBase) and value.ndim > tensordict.ndim:
            value.batch_size = tensordict.batch_size
    return tensordict


def zero_invalid(values: Tensor, valid: Tensor) -> Tensor:
    """Zero the invalid entries, and with them their gradient, whatever they hold (NaN and infinity included)."""
    return torch.where(valid, values, torch.zeros_like(values))


def divide(total: Tensor, count: Tensor) -> Tensor:
    """Divide a sum by the number of its entries, or by their weight; a sum of nothing stays 0."""
    return total / count.clamp_min(torch.finfo(count.dtype).tiny if count.is_floating_point() else 1)


def masked_mean(values: Tensor, valid: Tensor, count: Tensor | None = None) -> Tensor:
    """Sum the valid entries and divide by ``count``, by default their own number (0 if there is none)."""
    return divide(zero_invalid(values, valid).sum(), valid.sum() if count is None else count)


def standardize(values: Tensor, valid: Tensor, exclude_dims: Sequence[int] = ()) -> Tensor:
    """Shift and scale to mean 0 and unbiased standard deviation 1, as the valid entries have them.

    Args:
        values: any shape.
        valid: bool, of that shape.
        exclude_dims: dimensions along which each index has statistics of its own.
    """
    excluded = {dim % values.ndim for dim in exclude_dims}
    dims = [dim for dim in range(values.ndim) if dim not in excluded]
    count = valid.sum(dims, keepdim=True)
    centred = values - zero_invalid(values, valid).sum(dims, keepdim=True) / count.clamp_min(1)
    variance = zero_invalid(centred, valid).square().sum(dims, keepdim=True) / (count - 1).clamp_min(1)
    return centred / variance.sqrt().clamp_min(torch.finfo(torch.float32).resolution)


def effective_sample_size(log_weights: Tensor, valid: Tensor) -> Tensor:
    """Kish's effective sample size of the valid entries, as a fraction of their number (0 if there is none).

    Source: Kish, Survey Sampling (1965): ``(sum w)^2 / (n sum w^2)``.
    """
    # Subtracting the maximum keeps the squares finite; it cancels in the quotient.
    largest = log_weights.masked_fill(~valid, -torch.inf).amax().nan_to_num(neginf=0.0)
    weights = zero_invalid((log_weights - largest).exp(), valid)
    return weights.sum().square() / (weights.square().sum() * valid.sum()).clamp_min(torch.finfo(weights.dtype).tiny)
