"""Linear layers with low-rank adapters: several of one input as a single product, the adapters inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

ADAPTER = "default"
"""Name of the one adapter that a layer has, as peft calls it."""

_ALIGNMENT = 8  # elements: rows of 16 bytes, which the fastest products of 16-bit numbers ask for


class Adapters(NamedTuple):
    """The adapters of a linear layer, or of several that read the same input and are computed as one.

    Args:
        downs: each adapter's ``A``, ``[r, K]``, as it is trained.
        ups: each adapter's ``B``, ``[N_i, r]``, as it is trained.
        starts: first output feature of each adapter.
        scales: each adapter's ``alpha / rank``.
        down: all ``A`` one above the other, ``[R, K]``, in the dtype that is computed in; None if the layer is
            computed from ``downs`` and ``ups`` themselves.
        extended: the weight, and beside it all ``scale * B`` on a block diagonal, ``[N, K + R]``; None likewise.
    """

    downs: list[Tensor]
    ups: list[Tensor]
    starts: tuple[int, ...]
    scales: tuple[float, ...]
    down: Tensor | None = None
    extended: Tensor | None = None


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
    """``W x + b + scale * B A x``, ``[..., K]`` to ``[..., N]``.

    Reference: `LoRA <https://arxiv.org/abs/2106.09685>`_.
    """
    if not isinstance(layer, tuple):
        return layer(x)
    adapters = layer.adapters
    if adapters is None:
        return F.linear(x, layer.weight, layer.bias)
    if adapters.down is None or adapters.extended is None:
        (down,), (up,), (scale,) = adapters.downs, adapters.ups, adapters.scales
        low = F.linear(x, down.to(x.dtype))
        return F.linear(x, layer.weight, layer.bias) + scale * F.linear(low, up.to(x.dtype))
    arguments = x, adapters.extended, layer.bias, adapters.down
    if torch.is_grad_enabled():
        return _ExtendedLinear.apply(*arguments, adapters.starts, adapters.scales, *adapters.downs, *adapters.ups)
    return _extended_linear(*arguments)


def linear_group(x: Tensor, layers: Sequence[Linear], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the outputs of several layers of one input, which may be fused into one.

    Args:
        x: ``[..., K]``.
        layers: one per output, or a single fused one.
        sizes: output features of each.
    """
    if len(layers) == 1:
        return linear(x, layers[0]).split(list(sizes), dim=-1)
    return tuple(linear(x, layer) for layer in layers)


@torch.library.custom_op("torchrl_vla::extended_linear", mutates_args=("wide",))
def _extended_product(wide: Tensor, extended: Tensor, bias: Tensor | None, down: Tensor) -> Tensor:
    """Put ``A x`` beside ``x``, in the last columns of ``wide`` [M, K + R], and multiply both: [M, N]."""
    inputs = down.shape[1]
    torch.mm(wide[:, :inputs], down.t(), out=wide[:, inputs:])
    return F.linear(wide, extended, bias)


@_extended_product.register_fake
def _(wide: Tensor, extended: Tensor, bias: Tensor | None, down: Tensor) -> Tensor:
    return wide.new_empty(wide.shape[0], extended.shape[0])  # not len, which would fix the number of rows


def _extended_linear(x: Tensor, extended: Tensor, bias: Tensor | None, down: Tensor) -> Tensor:
    """Return the layer's output [..., N], without gradient."""
    # One product of K + R terms: cheaper than adding a second product to the first's result, and rounded once.
    # Compiled, what computes x writes it into the wide matrix itself; concatenation would copy it.
    wide = F.pad(x.flatten(0, -2), (0, extended.shape[1] - x.shape[-1]))
    return _extended_product(wide, extended, bias, down).view(*x.shape[:-1], len(extended))


class _ExtendedLinear(torch.autograd.Function):
    """A frozen linear layer with adapters: computes with copies of them, and gives the gradients to the originals."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        extended: Tensor,
        bias: Tensor | None,
        down: Tensor,
        starts: tuple[int, ...],
        scales: tuple[float, ...],
        *adapters: Tensor,
    ) -> Tensor:
        # Concatenation, unlike without gradient: measured, it makes an update 1% shorter than the padded input.
        low = F.linear(x, down)
        output = F.linear(torch.cat([x, low], dim=-1), extended, bias)
        ctx.save_for_backward(x, low, extended, down)
        ctx.starts, ctx.scales = starts, scales
        downs, ups = adapters[: len(starts)], adapters[len(starts) :]
        ctx.shapes = [(len(a), len(b), a.dtype) for a, b in zip(downs, ups, strict=True)]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, low, extended, down = ctx.saved_tensors
        inputs = x.shape[-1]
        grad_rows, rows = grad.flatten(0, -2), x.flatten(0, -2)
        grad_both = grad_rows @ extended
        grad_low = grad_both[:, inputs:]
        grad_x = (grad_both[:, :inputs] + grad_low @ down).view(x.shape)
        grad_down, grad_up = grad_low.t() @ rows, grad_rows.t() @ low.flatten(0, -2)
        grad_downs, grad_ups, column = [], [], 0
        for (rank, features, dtype), start, scale in zip(ctx.shapes, ctx.starts, ctx.scales, strict=True):
            columns = slice(column, column + rank)
            grad_downs.append(grad_down[columns].to(dtype))
            grad_ups.append(grad_up[start : start + features, columns].to(dtype) * scale)
            column += rank
        return grad_x, None, None, None, None, None, *grad_downs, *grad_ups


def read_linear(module: Any, *, fused: bool = False) -> Linear:
    """Return what a module computes with, its adapter included unless that is switched off.

    Args:
        module: ``nn.Linear``, or peft's wrapper of one.
        fused: as for :func:`read_group`.
    """
    return read_group([module], fused=fused)[0]


def read_group(modules: Sequence[Any], *, fused: bool) -> tuple[Linear, ...]:
    """Several layers of one input.

    Args:
        modules: the layers.
        fused: read them as a single one where :func:`fuse_storage` has laid them so, with copies of their adapters
            beside the weights; whoever keeps those brings them up to date by :func:`copy_adapters`. Without, each layer
            is read as its modules hold it now.
    """
    layers = tuple(_read_layer(module) for module in modules)
    plain = [layer for layer in layers if isinstance(layer, LinearWeights)]
    if not fused or len(plain) < len(layers) or any(layer.weight.requires_grad for layer in plain):
        return layers
    storage = _shared_storage([layer.weight for layer in plain])
    if storage is None or (len(plain) > 1 and any(layer.bias is not None for layer in plain)):
        return layers
    inputs, start = plain[0].weight.shape[1], 0
    found: list[tuple[Adapters, int]] = []
    for layer in plain:
        if layer.adapters is not None:
            found.append((layer.adapters, start))
        start += len(layer.weight)
    weight, bias = storage[:, :inputs], plain[0].bias
    if not found:
        return (LinearWeights(weight, bias, None),)
    downs, ups = [one.downs[0] for one, _ in found], [one.ups[0] for one, _ in found]
    starts, scales = tuple(start for _, start in found), tuple(one.scales[0] for one, _ in found)
    rank = storage.shape[1] - inputs
    if rank < sum(len(down) for down in downs):
        return layers
    adapters = Adapters(downs, ups, starts, scales, storage.new_zeros(rank, inputs), storage)
    copy_adapters(adapters)
    return (LinearWeights(weight, bias, adapters),)


def _read_layer(module: Any) -> Linear:
    base = _base_layer(module)
    if type(base) is not nn.Linear:
        return module
    adapters = None
    if base is not module and not module.disable_adapters:
        name = module.active_adapters[0]
        if module.training and not isinstance(module.lora_dropout[name], nn.Identity):
            return module
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
        adapters = Adapters([down], [up], (0,), (module.scaling[name],))
    return LinearWeights(base.weight, base.bias, adapters)


def _base_layer(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _shared_storage(weights: Sequence[Tensor]) -> Tensor | None:
    """``[N, K + R]``, the storage that weights fill one below the other with ``R`` columns to spare, or None."""
    first, start = weights[0], 0
    width, storage = first.stride(0), first.untyped_storage()
    for weight in weights:
        elsewhere = weight.untyped_storage().data_ptr() != storage.data_ptr()
        if elsewhere or weight.stride() != (width, 1) or weight.storage_offset() != start * width:
            return None
        start += len(weight)
    if storage.nbytes() != start * width * first.element_size():
        return None
    return first.detach().as_strided((start, width), (width, 1), 0)


@torch.no_grad()
def fuse_storage(modules: Sequence[Any]) -> None:
    """Lay the frozen weights of layers that read one input below each other, with columns for their adapters.

    The modules' parameters stay what they are, now parts of one storage. Layers that learn, several with biases, or
    what is no plain linear layer, are left alone.
    """
    layers = [_base_layer(module) for module in modules]
    if any(type(layer) is not nn.Linear or layer.weight.requires_grad for layer in layers):
        return
    if len(layers) > 1 and any(layer.bias is not None for layer in layers):
        return
    rank = sum(module.r[module.active_adapters[0]] for module in modules if isinstance(module, LoraLayer))
    rank = -(-rank // _ALIGNMENT) * _ALIGNMENT
    if rank == 0 and len(layers) == 1:
        return
    sizes, inputs = [layer.out_features for layer in layers], layers[0].in_features
    fused = layers[0].weight.new_zeros(sum(sizes), inputs + rank)
    for layer, part in zip(layers, fused[:, :inputs].split(sizes), strict=True):
        part.copy_(layer.weight)
        layer.weight.data = part


class AdapterCopy(NamedTuple):
    """One tensor of an adapter and what is computed with in its place, ``target = scale * source``.

    Args:
        source: ``[M, N]``, as it is trained.
        target: ``[M, N]``, a part of :attr:`Adapters.down` or :attr:`Adapters.extended`.
        scale: a number.
    """

    source: Tensor
    target: Tensor
    scale: float


def adapter_copies(adapters: Adapters) -> list[AdapterCopy]:
    """Return what :func:`copy_adapters` copies."""
    assert adapters.down is not None and adapters.extended is not None
    # Versions of their own: that these are written again and again is no business of a backward pass that is to come.
    down, extended = adapters.down.data, adapters.extended.data
    copies, row, inputs = [], 0, down.shape[1]
    for low, up, start, scale in zip(adapters.downs, adapters.ups, adapters.starts, adapters.scales, strict=True):
        end = row + len(low)
        copies.append(AdapterCopy(low, down[row:end], 1.0))
        copies.append(AdapterCopy(up, extended[start : start + len(up), inputs + row : inputs + end], scale))
        row = end
    return copies


@torch.no_grad()
def copy_adapters(adapters: Adapters) -> None:
    """Bring what is computed with up to date with what is trained."""
    for source, target, scale in adapter_copies(adapters):
        target.copy_(source if scale == 1.0 else source * scale)


def is_adapted(module: nn.Module) -> bool:
    """Whether a layer is peft's wrapper of another one."""
    return isinstance(module, LoraLayer)


def linear_rows(layer: Any, x: Tensor, begin: int, end: int) -> Tensor:
    """Output features ``begin:end`` of a bias-free linear layer, with its adapter if it has one.

    Args:
        layer: ``nn.Linear``, or peft's wrapper of one.
        x: [..., D].
        begin: first output feature.
        end: one past the last.

    Returns:
        [..., end - begin].
    """
    if not is_adapted(layer):
        return F.linear(x, layer.weight[begin:end])
    output = F.linear(x, layer.get_base_layer().weight[begin:end])
    if layer.disable_adapters:
        return output
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    low_rank = F.linear(layer.lora_dropout[ADAPTER](x), down.weight.to(x.dtype))
    return output + F.linear(low_rank, up.weight[begin:end].to(x.dtype)) * layer.scaling[ADAPTER]


def merged_weight(model: nn.Module, name: str, *, in_float32: bool = True) -> Tensor:
    """Return a parameter with its adapter added, ``W + scaling * B A``; the parameter itself if it has none.

    Args:
        model: the model; it is not changed.
        name: name of the parameter.
        in_float32: add in float32 and round once; else round the product to the weight's dtype first.
    """
    weight = model.get_parameter(name).detach()
    owner, _, leaf = name.rpartition(".")
    layer: Any = model.get_submodule(owner.removesuffix(".base_layer"))
    if leaf != "weight" or not is_adapted(layer):
        return weight
    down, up = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
    delta = (up.float().flatten(1) @ down.float().flatten(1)).view(weight.shape) * layer.scaling[ADAPTER]
    if in_float32:
        return (weight.float() + delta).to(weight.dtype)
    return weight + delta.to(weight.dtype)
