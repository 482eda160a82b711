"""Linear layers with low-rank adapters as one operator: products in the weights' dtype, float32 adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F


class Adapters(NamedTuple):
    """The adapters of a linear layer, or of several that read the same input and are computed as one.

    Args:
        downs: each adapter's ``A``, ``[r, K]``, as it is trained.
        ups: each adapter's ``B``, ``[N_i, r]``, as it is trained.
        starts: first output feature of each adapter.
        down: all ``A`` one above the other, ``[R, K]``, in the dtype that is computed in.
        up: all ``B`` on a block diagonal, ``[N, R]``, likewise.
        scale: ``alpha / rank``.
    """

    downs: list[Tensor]
    ups: list[Tensor]
    starts: list[int]
    down: Tensor
    up: Tensor
    scale: float


class LinearWeights(NamedTuple):
    """What a linear layer computes with, taken out of its module.

    Args:
        weight: ``[N, K]``.
        bias: ``[N]``, or None.
        adapters: None for a layer without.
    """

    weight: Tensor
    bias: Tensor | None
    adapters: Adapters | None


Linear = LinearWeights | nn.Module
"""A linear layer; a module where its weights are not plain numbers (4 bits) or its adapter has dropout."""


def linear(x: Tensor, layer: Linear) -> Tensor:
    """``W x + b + scale * B A x``, ``[..., K]`` to ``[..., N]``."""
    if not isinstance(layer, tuple):
        return layer(x)
    if layer.adapters is None:
        return F.linear(x, layer.weight, layer.bias)
    downs, ups, starts, down, up, scale = layer.adapters
    return lora_linear(x, layer.weight, layer.bias, down, up, scale, downs, ups, starts)[0]


def linear_group(x: Tensor, layers: Sequence[Linear], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The outputs of several layers of one input, which may be fused into one.

    Args:
        x: ``[..., K]``.
        layers: one per output, or a single fused one.
        sizes: output features of each.
    """
    if len(layers) == 1:
        return linear(x, layers[0]).split(list(sizes), dim=-1)
    return tuple(linear(x, layer) for layer in layers)


# One operator, so that a compiler neither splits it nor copies the result that the adapter is added to in place.
@torch.library.custom_op("torchrl_vla::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    starts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """A frozen linear layer with adapters; see :class:`Adapters`.

    Returns:
        The layer's output ``[..., N]`` and the adapters' ``A x``, ``[..., R]``.

    Reference: `LoRA <https://arxiv.org/abs/2106.09685>`_.
    """
    rows = x.reshape(-1, x.shape[-1])
    low = rows @ down.t()
    output = F.linear(rows, weight, bias).addmm_(low, up.t(), alpha=scale)
    return output.view(*x.shape[:-1], -1), low.view(*x.shape[:-1], -1)


@lora_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    starts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(weight)), x.new_empty(*x.shape[:-1], len(down))


@torch.library.custom_op("torchrl_vla::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    grad: Tensor, x: Tensor, low: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float, need_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`lora_linear`: of ``x`` (empty if not needed), and in float32 of ``down`` and ``up``."""
    grad_rows, rows, low = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (grad, x, low))
    grad_low = grad_rows @ up
    if scale != 1:
        grad_low *= scale
    grad_down = _product_float32(grad_low.t(), rows)
    grad_up = _product_float32(grad_rows.t(), low)
    if scale != 1:
        grad_up *= scale
    if not need_input:
        return x.new_empty(0), grad_down, grad_up
    return (grad_rows @ weight).addmm_(grad_low, down).view(x.shape), grad_down, grad_up


@lora_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, low: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float, need_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_input else (0,))
    return grad_x, down.new_empty(down.shape, dtype=torch.float32), up.new_empty(up.shape, dtype=torch.float32)


def _product_float32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated and kept in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, down, up, scale, downs, ups, starts = inputs
    ctx.save_for_backward(x, output[1], weight, down, up)
    ctx.scale, ctx.starts = scale, starts
    ctx.shapes = [(len(a), len(b), a.dtype) for a, b in zip(downs, ups, strict=True)]


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, low, weight, down, up = ctx.saved_tensors
    need_input = ctx.needs_input_grad[0]
    grad_x, grad_down, grad_up = lora_linear_backward(grad, x, low, weight, down, up, ctx.scale, need_input)
    grad_downs, grad_ups, rank_start = [], [], 0
    for (rank, features, dtype), start in zip(ctx.shapes, ctx.starts, strict=True):
        columns = slice(rank_start, rank_start + rank)
        grad_downs.append(grad_down[columns].to(dtype))
        grad_ups.append(grad_up[start : start + features, columns].to(dtype))
        rank_start += rank
    return grad_x if need_input else None, None, None, None, None, None, grad_downs, grad_ups, None


lora_linear.register_autograd(_backward, setup_context=_save_for_backward)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("torchrl_vla::lora_linear", _device, torch.bfloat16)


def read_linear(module: Any) -> Linear:
    """What a module computes with, its adapter included unless that is switched off.

    Args:
        module: ``nn.Linear``, or peft's wrapper of one.
    """
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if type(base) is not nn.Linear:
        return module
    adapters = None
    if base is not module and not module.disable_adapters:
        name = module.active_adapters[0]
        if module.training and not isinstance(module.lora_dropout[name], nn.Identity):
            return module
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
        dtype = base.weight.dtype
        adapters = Adapters([down], [up], [0], down.detach().to(dtype), up.detach().to(dtype), module.scaling[name])
    return LinearWeights(base.weight, base.bias, adapters)


def fuse_storage(modules: Sequence[Any]) -> None:
    """Lay the frozen weights of layers that read one input behind each other, so that they can be used as one.

    The modules' parameters stay what they are, now parts of one storage. Layers that learn, or are no plain linear
    layers without bias, are left alone.
    """
    layers = [module.get_base_layer() if isinstance(module, LoraLayer) else module for module in modules]
    if any(type(layer) is not nn.Linear or layer.bias is not None or layer.weight.requires_grad for layer in layers):
        return
    fused = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, fused.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part


def read_group(modules: Sequence[Any]) -> tuple[Linear, ...]:
    """Several layers of one input: as a single fused one where :func:`fuse_storage` has been, else each."""
    layers = tuple(read_linear(module) for module in modules)
    plain = [layer for layer in layers if isinstance(layer, LinearWeights)]
    if len(plain) < len(layers) or any(layer.bias is not None or layer.weight.requires_grad for layer in plain):
        return layers
    first, scales = plain[0].weight, {layer.adapters.scale for layer in plain if layer.adapters is not None}
    position, starts = first.data_ptr(), []
    for layer in plain:
        if layer.weight.data_ptr() != position or not layer.weight.is_contiguous():
            return layers
        position += layer.weight.nbytes
        starts.append((layer.weight.data_ptr() - first.data_ptr()) // first[0].nbytes)
    if first.untyped_storage().nbytes() < position - first.untyped_storage().data_ptr() or len(scales) > 1:
        return layers
    rows = starts[-1] + len(plain[-1].weight)
    weight = first.detach().as_strided((rows, first.shape[1]), first.stride())
    if not scales:
        return (LinearWeights(weight, None, None),)
    adapted = [(layer.adapters, start) for layer, start in zip(plain, starts, strict=True) if layer.adapters]
    downs = [adapters.downs[0] for adapters, _ in adapted]
    ups = [adapters.ups[0] for adapters, _ in adapted]
    down = torch.cat([adapters.down for adapters, _ in adapted])
    up = weight.new_zeros(rows, len(down))
    adapters = Adapters(downs, ups, [start for _, start in adapted], down, up, scales.pop())
    copy_adapters(adapters)
    return (LinearWeights(weight, None, adapters),)


@torch.no_grad()
def copy_adapters(adapters: Adapters) -> None:
    """Bring what is computed with up to date with what is trained."""
    column = 0
    for down, up, start in zip(adapters.downs, adapters.ups, adapters.starts, strict=True):
        columns = slice(column, column + len(down))
        adapters.down[columns].copy_(down)
        adapters.up[start : start + len(up), columns].copy_(up)
        column += len(down)
