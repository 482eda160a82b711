"""The Llama decoder of OpenVLA, run without a causal mask, and the prompt's layout in its sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_bidirectional_mask

from torchrl_vla.errors import UserError
from torchrl_vla.modules.openvla.attention import Attention
from torchrl_vla.modules.openvla.blocks import LayerStack, LlamaBlock, fuse_llama_layer, read_llama_layer
from torchrl_vla.modules.vmap import is_transformed


class RotaryEmbedding(nn.Module):
    """Llama's rotary angles without a buffer, so that casting or meta-building the model cannot spoil them.

    Args:
        config: the language model.

    Reference: `RoFormer <https://arxiv.org/abs/2104.09864>`_, equation 34, in Llama's split-half layout.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        rope: Any = config.rope_parameters
        self.theta: float = rope["rope_theta"]

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, head_dim] in ``x``'s dtype for ``position_ids`` [B, S]."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device) / self.head_dim
        angles = position_ids[..., None].float() * (1.0 / self.theta**exponent)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def build_language_model(config: LlamaConfig) -> Any:
    """Return a Llama with :class:`RotaryEmbedding` in place of transformers' buffered one, and its layers' stack."""
    model: Any = LlamaForCausalLM(config)
    model.model.rotary_emb = RotaryEmbedding(config)
    model.stack = decoder_stack(model.model.layers, config)
    return model


def decoder_stack(layers: nn.ModuleList, config: LlamaConfig) -> LayerStack:
    """Return the decoder's layers, run bidirectionally."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = config.hidden_size // heads
    attention = Attention(config, head_dim, heads // kv_heads)
    sizes = (config.hidden_size, kv_heads * head_dim, config.intermediate_size)
    return LayerStack(layers, read_llama_layer, LlamaBlock(attention, config.rms_norm_eps, *sizes), fuse_llama_layer)


class Prompt(NamedTuple):
    """A batch of prompts in the order the model reads them.

    Args:
        first: int64 [B, 1], the first token (BOS); the image patches follow it.
        rest: int64 [B, L], the other tokens, left-padded, 29871 in the last column.
        mask: bool [B, L], True at real tokens of ``rest``; None if there is no padding.
    """

    first: Tensor
    rest: Tensor
    mask: Tensor | None


def arrange_prompt(input_ids: Tensor, attention_mask: Tensor | None, empty_token_id: int, pad_token_id: int) -> Prompt:
    """Bring left- or right-padded prompts into one layout, and end each with the empty token (29871).

    No shape depends on the values, and on an accelerator nothing is read back. On the CPU the values are looked at, and
    no column and no mask are made that no row needs.

    Args:
        input_ids: int64 [B, L].
        attention_mask: [B, L], nonzero at real tokens, which are contiguous. None says that there is no padding and
            every row ends with the empty token.
        empty_token_id: the token to end with.
        pad_token_id: the token in unused places (its embedding is never attended to).

    Raises:
        ValueError: if the shapes differ, a row has no token, or ``attention_mask`` is None, the ids are on the CPU and
            a row does not end with the empty token.

    Example:
        >>> arrange_prompt(torch.tensor([[1, 5, 6], [1, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]), 3, 9).rest
        tensor([[5, 6, 3],
                [9, 7, 3]])
    """
    if input_ids.dim() != 2:
        raise UserError(f"input_ids must be [batch, length], got shape {tuple(input_ids.shape)}.")
    inspect = input_ids.device.type == "cpu" and not (torch.compiler.is_compiling() or is_transformed([input_ids]))
    if attention_mask is None:
        if inspect and not bool((input_ids[:, -1] == empty_token_id).all()):
            raise UserError(
                f"without an attention_mask every prompt must end with the token {empty_token_id}; pass "
                "attention_mask=torch.ones_like(input_ids) to have it appended where it is missing."
            )
        return Prompt(input_ids[:, :1], input_ids[:, 1:], None)
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} differ in shape."
        )
    real = attention_mask.bool()
    if inspect and not bool(real.any(dim=1).all()):
        raise UserError("a row of attention_mask is all zero: every prompt needs at least one token.")
    start = real.int().argmax(dim=1, keepdim=True)
    count = real.sum(dim=1, keepdim=True)
    last = input_ids.gather(1, start + count - 1)
    total = count + (last != empty_token_id)
    length = int(total.max()) if inspect else input_ids.shape[1] + 1

    # rank[i, j]: which token of prompt i stands in column j of `rest`, counted from its first token.
    rank = torch.arange(1, length, device=input_ids.device) + total - length
    tokens = input_ids.gather(1, (start + rank).clamp(0, input_ids.shape[1] - 1))
    # Not torch.where, which may bring a number to the GPU by a copy that a recording cannot hold.
    tokens = tokens.masked_fill(rank >= count, empty_token_id)
    mask = rank >= 1
    rest = tokens.masked_fill(~mask, pad_token_id)
    return Prompt(input_ids.gather(1, start), rest, None if inspect and bool(mask.all()) else mask)


def sequence_mask(prompt: Prompt, num_patches: int, num_slots: int) -> Tensor | None:
    """Mask [B, 1 + P + L + slots] of the whole sequence around a prompt's mask; None if there is no padding."""
    if prompt.mask is None:
        return None
    batch = len(prompt.mask)
    before, after = prompt.mask.new_ones(batch, 1 + num_patches), prompt.mask.new_ones(batch, num_slots)
    return torch.cat([before, prompt.mask, after], dim=1)


def decode_bidirectional(
    model: Any, inputs_embeds: Tensor, mask: Tensor | None, rows: tuple[int, int] | None = None
) -> Tensor:
    """Run the decoder with every token attending to every real token, as OpenVLA-OFT does.

    Args:
        model: a language model of :func:`build_language_model`.
        inputs_embeds: [B, S, D].
        mask: bool [B, S], True at real tokens; None if there is no padding, which leaves attention its fastest kernel.
        rows: first position that is wanted and the one after the last, each from the end (negative); None for all. The
            last layer leaves the others out: 2% of the decoder's work on a chunk of 56 tokens behind 293 others.

    Returns:
        [B, S, D], or of the wanted positions only, after the final norm. Positions count real tokens; rows of padding
        are meaningless.
    """
    if mask is None:
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        attention_mask = None
    else:
        position_ids = (mask.cumsum(dim=1) - 1).clamp_min(0)
        attention_mask = create_bidirectional_mask(model.config, inputs_embeds, mask, allow_is_bidirectional_skip=False)
    cos, sin = model.model.rotary_emb(inputs_embeds, position_ids)
    return model.model.norm(model.stack(inputs_embeds, cos, sin, attention_mask, rows=rows))
