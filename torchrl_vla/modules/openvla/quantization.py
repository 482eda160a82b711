"""4-bit weights through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchrl_vla.errors import UserError

if TYPE_CHECKING:
    from torchrl_vla.modules.openvla.model import OpenVLA

__all__ = ["check_4bit", "prepare_4bit", "quantize_weight", "quantized_linears"]

# The head is read by rows, and the small networks beside the model cost nothing at full precision.
_FULL_PRECISION = ("language_model.lm_head", "action_head", "proprio_projector")


def check_4bit(device: torch.device) -> None:
    """Refuse what 4-bit weights cannot do without.

    Args:
        device: where the weights will be.

    Raises:
        ValueError: without CUDA or without bitsandbytes.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(
            f"load_in_4bit needs a CUDA device, but the model goes to {str(device)!r} and CUDA is "
            f"{'' if torch.cuda.is_available() else 'not '}available: pass device='cuda' on a GPU machine, or leave "
            "load_in_4bit out."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs bitsandbytes: install it with `pip install torchrl-vla[cuda]`.")


def prepare_4bit(model: OpenVLA, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Put bitsandbytes' 4-bit layers (NF4) in the place of a weightless model's linear layers.

    Args:
        model: a model on the meta device, changed in place.
        device: where its weights will be.
        compute_dtype: dtype of the products.

    Raises:
        ValueError: without CUDA or without bitsandbytes.

    Reference: `QLoRA <https://arxiv.org/abs/2305.14314>`_.
    """
    check_4bit(device)
    from bitsandbytes.nn import Linear4bit

    for name, module in quantized_linears(model).items():
        with torch.device("meta"):
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=compute_dtype,
                quant_type="nf4",
            )
        model.set_submodule(name, layer)
    # peft reads this to choose its adapter for 4-bit layers.
    model.is_loaded_in_4bit = True


def quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers that are quantised, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not name.startswith(_FULL_PRECISION)
    }


def quantize_weight(module: nn.Module, leaf: str, tensor: Tensor) -> nn.Parameter | None:
    """Return the quantised parameter of a 4-bit layer's weight; None for any other parameter."""
    if leaf != "weight" or type(module).__name__ != "Linear4bit":
        return None
    from bitsandbytes.nn import Params4bit

    return Params4bit(tensor, requires_grad=False, quant_type="nf4", module=module).to(tensor.device)
