"""Base OpenVLA's decoding: one token after the other, through a cache whose size never changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_vla.modules.distributions import draw_bins
from torchrl_vla.modules.openvla.linear import linear_rows

Choice = Callable[[Tensor, int], Tensor]
"""Logits [B, 1, vocabulary] and the number of the token, from 0, to that token, int64 [B, 1]."""

_ALIGNMENT = 8  # attention's kernels want masks of such a width


class Decoded(NamedTuple):
    """What decoding gives.

    Args:
        tokens: int64 [B, T].
        logits: [B, T, vocabulary], each token's.
    """

    tokens: Tensor
    logits: Tensor


def choose_token(begin: int, num_bins: int, temperature: Tensor | None, uniform: Tensor | None) -> Choice:
    """How tokens are chosen: the most likely of the whole vocabulary, or drawn among the action tokens.

    Args:
        begin: id of the first action token.
        num_bins: number of action tokens.
        temperature: [], of the draw; None to take the most likely token.
        uniform: [B, T] numbers in [0, 1) to draw with; None likewise.
    """
    if temperature is None or uniform is None:
        return lambda logits, number: logits.argmax(dim=-1)

    def draw(logits: Tensor, number: int) -> Tensor:
        # A draw from NaN would be an id out of bounds; whoever is given the logits sees what is wrong with them.
        probs = (logits[:, 0, begin : begin + num_bins].float().nan_to_num() / temperature).softmax(dim=-1)
        return begin + draw_bins(probs, uniform[:, number : number + 1])

    return draw


def decode_autoregressively(
    model: Any, inputs_embeds: Tensor, mask: Tensor, num_tokens: int, choose: Choice
) -> Decoded:
    """Go on from a prompt, one token after the other, each attending to what is before it.

    Nothing is read back and no shape depends on a value, so that a GPU can replay all of it as one graph.

    Args:
        model: a language model of :func:`build_language_model`.
        inputs_embeds: [B, S, D], the prompt; its first column is real in every row.
        mask: bool [B, S], True at real tokens. Positions count real tokens.
        num_tokens: T.
        choose: takes each token from its logits.
    """
    decoder, config = model.model, model.config
    batch, length, _ = inputs_embeds.shape
    size = -(-(length + num_tokens - 1) // _ALIGNMENT) * _ALIGNMENT
    width = model.stack.block.qkv_sizes[1]
    caches = [
        (inputs_embeds.new_zeros(batch, size, width), inputs_embeds.new_zeros(batch, size, width))
        for _ in decoder.layers
    ]
    real = torch.cat([mask, mask.new_ones(batch, size - length)], dim=1)
    place = torch.arange(size, device=mask.device)
    visible = (real[:, None] & (place <= place[:, None]))[:, None]
    position_ids = (real.cumsum(dim=1) - 1).clamp_min(0)

    states, begin = inputs_embeds, 0
    tokens, logits = [], []
    for number in range(num_tokens):
        end = begin + states.shape[1]
        cos, sin = decoder.rotary_emb(states, position_ids[:, begin:end])
        states = model.stack.extend(states, cos, sin, visible[:, :, begin:end], caches, place[begin:end])
        logits.append(linear_rows(model.lm_head, decoder.norm(states[:, -1:]), 0, config.vocab_size))
        tokens.append(choose(logits[-1], number))
        states, begin = decoder.embed_tokens(tokens[-1]), end
    return Decoded(torch.cat(tokens, dim=1), torch.cat(logits, dim=1))
