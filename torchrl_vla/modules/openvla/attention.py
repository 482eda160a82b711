"""Attention through transformers' interface, and the choice of its kernel."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import is_flash_attn_2_available

from torchrl_vla.errors import UserError

ATTENTION_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "eager")

_logger = logging.getLogger(__name__)


@functools.cache
def resolve_attention(requested: str | None, device_type: str, dtype: torch.dtype) -> str:
    """Return the attention kernel to use: the one asked for, else flash-attention 2 where it can run, else SDPA.

    Raises:
        ValueError: if the kernel is unknown, or flash-attention 2 is asked for and cannot run.
    """
    if requested is not None and requested not in ATTENTION_IMPLEMENTATIONS:
        raise UserError(
            f"attn_implementation must be one of {', '.join(ATTENTION_IMPLEMENTATIONS)} or None, got {requested!r}."
        )
    missing = None
    if not is_flash_attn_2_available():  # flash-attention 4 installs a package of the same name
        missing = "the package flash-attn (2.3.3 or later) is not installed, or there is no CUDA"
    elif device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        missing = f"it needs a CUDA device and bfloat16 or float16, not {device_type} and {dtype}"
    if requested == "flash_attention_2" and missing:
        raise UserError(f"attn_implementation 'flash_attention_2' cannot be used: {missing}. Use 'sdpa'.")
    chosen = requested or ("sdpa" if missing else "flash_attention_2")
    _logger.info("attention kernel: %s%s", chosen, f" ({missing})" if requested is None and missing else "")
    return chosen


class Attention(nn.Module):
    """Bidirectional attention through transformers' interface; it has no weights and serves a whole stack.

    Args:
        config: transformers' configuration of the stack, which names the kernel.
        head_dim: width of a head.
        num_key_value_groups: query heads per key/value head.
    """

    is_causal = False

    def __init__(self, config: PretrainedConfig, head_dim: int, num_key_value_groups: int = 1) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.num_key_value_groups = num_key_value_groups

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over ``[B, S, H * head_dim]`` each, heads already turned; returns ``[B, S, H * head_dim]``."""
        heads = [x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value)]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, *heads, mask, scaling=self.head_dim**-0.5, dropout=0.0, is_causal=False)
        return output.flatten(-2)

    def attend_cached(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Attend from ``[B, T, H * head_dim]`` to a cache; ``visible`` is bool [B, 1, T, cache size]."""
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value))
        grouped = self.num_key_value_groups > 1
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=grouped)
        return output.transpose(1, 2).flatten(-2)
