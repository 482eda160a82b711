"""The transformer layers of OpenVLA as functions of tensors, and stacks of them: one forward, eager or compiled.

A function of tensors is compiled once and then serves every layer of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchrl_vla.modules.openvla.attention import Attention
from torchrl_vla.modules.openvla.linear import (
    Adapters,
    Linear,
    LinearWeights,
    fuse_storage,
    linear,
    linear_group,
    read_group,
    read_linear,
)

Block = Callable[..., Tensor]


class LlamaWeights(NamedTuple):
    """Of one decoder layer: ``qkv`` and ``gate_up`` are one fused layer each, or three and two."""

    input_norm: Tensor
    qkv: tuple[Linear, ...]
    output: Linear
    mlp_norm: Tensor
    gate_up: tuple[Linear, ...]
    down: Linear


class LlamaBlock:
    """Computes Llama decoder layers.

    Args:
        attention: of the stack.
        eps: of RMSNorm.
        hidden_size: width of the hidden states.
        key_value_size: width of all key heads together.
        mlp_size: hidden width of the SwiGLU.
    """

    def __init__(self, attention: Attention, eps: float, hidden_size: int, key_value_size: int, mlp_size: int) -> None:
        self.attention = attention
        self.eps = eps
        self.qkv_sizes = (hidden_size, key_value_size, key_value_size)
        self.mlp_sizes = (mlp_size, mlp_size)

    def __call__(
        self,
        x: Tensor,
        weights: LlamaWeights,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None = None,
        place: Tensor | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """Compute a layer.

        Args:
            x: [B, S, D].
            weights: the layer's.
            cos: [B or 1, S, head_dim].
            sin: likewise.
            mask: [B, 1, S, S] or None; with a cache bool [B, 1, S, cache size], True where attention is allowed.
            cache: keys and values of earlier tokens, [B, cache size, key_value_size] each; the new ones are written.
            place: int64 [S], where in the cache.
            rows: first position that is wanted and the one after the last, each from the end (negative); None for all.

        Returns:
            [B, S, D], or of the wanted positions only.
        """
        states = _rms_norm(x, weights.input_norm, self.eps)
        query, key, value = linear_group(states, weights.qkv, self.qkv_sizes)
        query, key = (_rotate(states, cos, sin, self.attention.head_dim) for states in (query, key))
        if rows is not None:
            # Others are needed as keys and values alone. A mask of two dimensions says which of those are real.
            wanted = slice(*rows)
            x, query = x[:, wanted], query[:, wanted]
            mask = mask[:, :, wanted] if mask is not None and mask.ndim == 4 else mask
        if cache is None or place is None or mask is None:
            attended = self.attention(query, key, value, mask)
        else:
            key, value = (old.index_copy_(1, place, new) for old, new in zip(cache, (key, value), strict=True))
            attended = self.attention.attend_cached(query, key, value, mask)
        x = x + linear(attended, weights.output)
        states = _rms_norm(x, weights.mlp_norm, self.eps)
        gate, up = linear_group(states, weights.gate_up, self.mlp_sizes)
        return x + linear(F.silu(gate) * up, weights.down)


def read_llama_layer(layer: Any, fused: bool) -> LlamaWeights:
    """Return the weights of transformers' ``LlamaDecoderLayer``; ``fused`` as for :func:`read_group`."""
    attention, mlp = layer.self_attn, layer.mlp
    return LlamaWeights(
        layer.input_layernorm.weight,
        read_group([attention.q_proj, attention.k_proj, attention.v_proj], fused=fused),
        read_linear(attention.o_proj, fused=fused),
        layer.post_attention_layernorm.weight,
        read_group([mlp.gate_proj, mlp.up_proj], fused=fused),
        read_linear(mlp.down_proj, fused=fused),
    )


def fuse_llama_layer(layer: Any) -> None:
    """Lay the frozen weights of a decoder layer so that :func:`read_llama_layer` finds them fused."""
    attention, mlp = layer.self_attn, layer.mlp
    for group in ([attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj],
                  [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]):  # fmt: skip
        fuse_storage(group)


class ViTWeights(NamedTuple):
    """Of one vision layer; ``scale1`` and ``scale2`` are DINOv2's LayerScale, None in SigLIP."""

    norm1: tuple[Tensor, Tensor]
    qkv: Linear
    output: Linear
    scale1: Tensor | None
    norm2: tuple[Tensor, Tensor]
    fc1: Linear
    fc2: Linear
    scale2: Tensor | None


class ViTBlock:
    """Computes ViT layers with exact GELU.

    Args:
        attention: of the stack.
        eps: of LayerNorm.
    """

    def __init__(self, attention: Attention, eps: float) -> None:
        self.attention = attention
        self.eps = eps

    def __call__(self, x: Tensor, weights: ViTWeights) -> Tensor:
        """``x`` [B, N, D] to the same."""
        width = x.shape[-1:]
        query, key, value = linear(F.layer_norm(x, width, *weights.norm1, self.eps), weights.qkv).chunk(3, dim=-1)
        attended = linear(self.attention(query, key, value), weights.output)
        x = x + (attended if weights.scale1 is None else attended * weights.scale1)
        states = linear(F.layer_norm(x, width, *weights.norm2, self.eps), weights.fc1)
        states = linear(F.gelu(states), weights.fc2)
        return x + (states if weights.scale2 is None else states * weights.scale2)


def read_dinov2_layer(layer: Any, fused: bool) -> ViTWeights:
    """Return the weights of transformers' ``Dinov2WithRegistersLayer`` with fused query, key and value."""
    scales = layer.layer_scale1.lambda1, layer.layer_scale2.lambda1
    return _read_vit_layer(layer.attention, layer.mlp, layer.norm1, layer.norm2, scales, fused)


def read_siglip_layer(layer: Any, fused: bool) -> ViTWeights:
    """Return the weights of transformers' ``SiglipEncoderLayer`` with fused query, key and value."""
    return _read_vit_layer(layer.self_attn, layer.mlp, layer.layer_norm1, layer.layer_norm2, (None, None), fused)


def _read_vit_layer(
    attention: Any, mlp: Any, norm1: Any, norm2: Any, scales: tuple[Tensor | None, Tensor | None], fused: bool
) -> ViTWeights:
    qkv, output, fc1, fc2 = (
        read_linear(module, fused=fused) for module in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
    )
    first, second = (norm1.weight, norm1.bias), (norm2.weight, norm2.bias)
    return ViTWeights(first, qkv, output, scales[0], second, fc1, fc2, scales[1])


def fuse_vit_layer(layer: Any) -> None:
    """Make room for the adapters of a vision layer beside its frozen weights."""
    attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
    for module in (attention.qkv, attention.proj, layer.mlp.fc1, layer.mlp.fc2):
        fuse_storage([module])


class LayerStack:
    """Runs layers of one kind, one after the other.

    Args:
        layers: the modules that own the weights.
        read: takes the weights out of one, fused or not.
        block: computes a layer: hidden states, weights, and what all layers share.
        fuse: lays the weights of one so that ``read`` finds them fused.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        read: Callable[[Any, bool], Any],
        block: Block,
        fuse: Callable[[Any], None],
    ) -> None:
        self.layers = layers
        self.recompute = 0.0
        self._read, self._fuse = read, fuse
        self.block = block
        self.keeps_weights = True
        self.times_read = 0
        self._compiles = False
        self._block: Block | None = None
        self._cache: dict[tuple[bool, ...], tuple[list[Any], Block]] | None = None
        self._switch: Any = None
        self._learner: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, of this process or another, reads its own layers and compiles for itself.
        return self.__dict__ | {"_block": None, "_cache": None if self._cache is None else {}}

    def __call__(self, x: Tensor, *shared: Tensor | None, rows: tuple[int, int] | None = None) -> Tensor:
        """Run every layer on ``x`` [B, S, D]; ``recompute`` is the share of them that keeps no activations.

        Args:
            x: hidden states.
            shared: what each layer takes besides.
            rows: the positions wanted of the last layer, as :class:`LlamaBlock` takes them; None for all.
        """
        layers, block = self.weights()
        recomputed = round(self.recompute * len(layers)) if torch.is_grad_enabled() else 0
        if block is not self.block:
            mark_batch(x, *shared)
        last: dict[str, Any] = {}
        for index, weights in enumerate(layers):
            if rows is not None and index == len(layers) - 1:
                last = {"rows": rows}
                if block is not self.block:
                    mark_batch(x)  # this layer is compiled by itself
            if index < recomputed:
                # Nothing is drawn but by dropout, and a recording could not read the generator's state.
                x = checkpoint(  # type: ignore[assignment]
                    block, x, weights, *shared, use_reentrant=False, preserve_rng_state=self.layers.training, **last
                )
            else:
                x = block(x, weights, *shared, **last)
        return x

    @torch.no_grad()
    def extend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        place: Tensor,
    ) -> Tensor:
        """Run decoder layers on further tokens; the arguments are :class:`LlamaBlock`'s, with a cache per layer."""
        layers, block = self.weights()
        if block is not self.block:
            mark_batch(x, cos, sin, visible, *(part for cache in caches for part in cache))
        for weights, cache in zip(layers, caches, strict=True):
            x = block(x, weights, cos, sin, visible, cache, place)
        return x

    def accelerate(self, compile_layers: bool) -> None:
        """Fuse and keep the weights, and compile the block; see :meth:`OpenVLA.accelerate`."""
        for layer in self.layers:
            self._fuse(layer)
        self._compiles, self._block = compile_layers, None
        self.forget_weights()

    def forget_weights(self) -> None:
        """Read the weights anew on the next call, with the adapters that the layers then have."""
        self._cache = {}
        self._switch = next((module for module in self.layers.modules() if isinstance(module, LoraLayer)), None)
        self._learner = next((p for p in self.layers.parameters() if p.requires_grad), None)

    @contextmanager
    def without_kept_weights(self) -> Iterator[None]:
        """Compute from what the layers hold now, whatever that is, and keep nothing of it."""
        self.keeps_weights = False
        try:
            yield
        finally:
            self.keeps_weights = True

    def adapters(self) -> Iterable[Adapters]:
        """Return the adapters that are kept once :meth:`accelerate` was called; more as ``times_read`` grows."""
        for layers, _ in (self._cache or {}).values():
            for leaf in _leaves(tuple(layers)):
                if isinstance(leaf, LinearWeights) and leaf.adapters is not None and leaf.adapters.down is not None:
                    yield leaf.adapters

    def weights(self) -> tuple[list[Any], Block]:
        """Read every layer's weights, if they are not kept from an earlier call, and choose what computes with them."""
        if self._cache is None or not self.keeps_weights:
            return [self._read(layer, False) for layer in self.layers], self.block
        # Adapters may be switched off for a while (the reference policy), and what learns may be held, which changes
        # what is read.
        adapters_off = self._switch is not None and self._switch.disable_adapters
        held = self._learner is not None and not self._learner.requires_grad
        key = (adapters_off, held, self.layers.training)
        if key not in self._cache:
            layers = [self._read(layer, True) for layer in self.layers]
            self.times_read += 1
            plain = not any(isinstance(leaf, nn.Module) for layer in layers for leaf in _leaves(layer))
            # A compiler would make code for each module that it is given.
            self._cache[key] = layers, self._compiled_block() if plain and self._compiles else self.block
        return self._cache[key]

    def _compiled_block(self) -> Block:
        if self._block is None:
            # Its method: what is compiled should be a plain function. It rounds where the plain one does; else that is
            # up to what the compiler fuses, and a rollout and its update, which differ in that, would disagree.
            plain = self.block.__call__  # type: ignore[operator]
            self._block = torch.compile(plain, fullgraph=True, options={"emulate_precision_casts": True})
        return self._block


def _leaves(weights: Any) -> Iterable[Any]:
    """Linear layers, and whatever else a layer's weights are made of."""
    if isinstance(weights, tuple) and not isinstance(weights, LinearWeights):
        for part in weights:
            yield from _leaves(part)
    else:
        yield weights


def mark_batch(*tensors: Tensor | None) -> None:
    """Tell the compiler that the first dimension varies, so that one compilation serves every batch size but 1."""
    for tensor in tensors:
        if tensor is not None and len(tensor) > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    states = x.float()
    return weight * (states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Rotary position embedding in Llama's split-half layout, ``[B, S, H * head_dim]``."""
    heads = x.unflatten(-1, (-1, head_dim))
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (heads * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).flatten(-2)
