"""What is to run under ``torch.vmap``, as TorchRL's advantage estimators call a value network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # nothing public tells


def is_transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether any tensor is one of ``torch.func``, of which neither address nor value can be looked at."""
    return any(tensor is not None and is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def call_on_batch(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call a function that looks at values or leaves PyTorch; under ``vmap`` with its dimension in that of the batch.

    Args:
        function: of tensors [B, ...] to tensors [B, ...], sample by sample, without gradient.
        tensors: its arguments.

    Examples:
        >>> def doubled(x):
        ...     return (torch.tensor([[2 * number for number in row] for row in x.tolist()]),)
        >>> torch.vmap(lambda x: call_on_batch(doubled, x)[0])(torch.ones(3, 4, 2)).shape
        torch.Size([3, 4, 2])
    """
    return _CallOnBatch.apply(function, *tensors) if is_transformed(tensors) else function(*tensors)


class _CallOnBatch(torch.autograd.Function):
    """A function without gradient that ``vmap`` calls once, with all that it maps over in one batch."""

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[override]
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], function: Any, *tensors: Tensor) -> tuple[Any, Any]:
        size = info.batch_size
        flat = [
            (tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).flatten(0, 1)
            for tensor, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        results = tuple(result.unflatten(0, (size, -1)) for result in call_on_batch(function, *flat))
        return results, (0,) * len(results)
