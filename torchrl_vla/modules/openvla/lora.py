"""Low-rank adapters on an OpenVLA: upstream's placement and merge, through peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from torchrl_vla.errors import UserError
from torchrl_vla.modules.openvla.linear import ADAPTER, is_adapted, merged_weight

if TYPE_CHECKING:
    from torchrl_vla.modules.openvla.model import OpenVLA

__all__ = [
    "adaptable_modules",
    "add_lora",
    "attach_adapters",
    "freeze_backbone",
    "has_lora",
    "lora_layers",
    "merge_lora",
    "without_adapters",
]

_BACKBONE = ("vision_backbone", "projector", "language_model")


def adaptable_modules(model: OpenVLA) -> list[str]:
    """Names of the layers that upstream's ``all-linear`` adapts.

    They are every linear layer of the towers, the projector and the language model, its head included, and the two
    patch embeddings (peft matches their name ``proj``). Layers that no forward reads are not built, so upstream's
    110,828,288 adapter parameters of rank 32 on the 7B model become 109,126,400 here.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.split(".")[0] in _BACKBONE
    ]


def add_lora(
    model: OpenVLA,
    *,
    rank: int = 32,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    dtype: torch.dtype = torch.float32,
) -> OpenVLA:
    """Freeze a model and add trainable adapters, ``W x + (alpha / rank) B A x`` with gaussian ``A`` and zero ``B``.

    Args:
        model: the model, changed in place.
        rank: rank of the adapters.
        alpha: their scale; more than ``min(rank, 16)`` is capped there, as upstream does.
        dropout: dropout on their input.
        target_modules: ``all-linear`` (see :func:`adaptable_modules`), or ends of module names such as ``["q_proj"]``.
        dtype: dtype of the adapters' weights.

    Returns:
        The same model. The heads are frozen as well, so that :func:`without_adapters` gives the model as it was.

    Raises:
        ValueError: if a number is out of range, a target fits no layer, or the model has adapters already.

    Reference: `LoRA <https://arxiv.org/abs/2106.09685>`_.

    Example:
        >>> from torchrl_vla.modules import OpenVLA, OpenVLAConfig
        >>> model = add_lora(OpenVLA(OpenVLAConfig.tiny()), rank=8)
        >>> all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
        True
    """
    if rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}.")
    if alpha < 1:
        raise UserError(f"alpha must be at least 1, got {alpha}.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be in [0, 1), got {dropout}.")
    names = _select(model, target_modules)
    attach_adapters(model, names, rank=rank, alpha=min(alpha, rank, 16), dropout=dropout, dtype=dtype)
    return model


def _select(model: OpenVLA, target_modules: str | list[str]) -> list[str]:
    """Full names of the layers to adapt."""
    candidates = adaptable_modules(model)
    if target_modules == "all-linear":
        return candidates
    if isinstance(target_modules, str):
        raise UserError(f"target_modules must be 'all-linear' or a list of module names, got {target_modules!r}.")
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in candidates):
            kinds = sorted({name.rpartition(".")[2] for name in candidates})
            raise UserError(f"target module {target!r} fits no layer; the layers are called {', '.join(kinds)}.")
    return [name for name in candidates if any(f".{name}".endswith(f".{target}") for target in target_modules)]


def attach_adapters(
    model: OpenVLA, names: list[str], *, rank: int, alpha: int, dropout: float, dtype: torch.dtype
) -> None:
    """Put adapters on layers, with gaussian ``A`` and zero ``B``, and freeze everything else.

    Args:
        model: the model, changed in place.
        names: full names of the layers.
        rank: rank of the adapters.
        alpha: their scale times the rank.
        dropout: dropout on their input.
        dtype: dtype of the adapters' weights.

    Raises:
        ValueError: the model has adapters already.
    """
    if has_lora(model):
        raise UserError("the model has adapters already: merge them with merge_lora before adding others.")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, init_lora_weights="gaussian"
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Find peft's wrappers, by name."""
    return {name: module for name, module in model.named_modules() if is_adapted(module)}


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return bool(lora_layers(model))


def freeze_backbone(model: OpenVLA) -> None:
    """Take gradients from the towers, the projector and the language model; adapters and heads keep theirs.

    Heads compute in the dtype of their own weights, which is float32 from here on: an optimizer's steps are smaller
    than what bfloat16 can add to a weight.
    """
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in _BACKBONE and ".lora_" not in name:
            parameter.requires_grad_(False)
        else:
            parameter.data = parameter.data.float()


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run a model as it was before :func:`add_lora`: the reference policy of a KL term, at no memory.

    Raises:
        ValueError: if the model has no adapters, as then it would be its own reference.
    """
    layers = list(lora_layers(model).values())
    if not layers:
        raise UserError("the model has no adapters to leave out: a reference without them needs use_lora=True.")
    # peft's own switch also clears requires_grad, which must outlive this block; the flag alone is what forward reads.
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


@torch.no_grad()
def merge_lora(model: OpenVLA, *, in_float32: bool = True) -> OpenVLA:
    """Add the adapters to their weights and take them away; the model is again one without adapters.

    Args:
        model: the model, changed in place.
        in_float32: add in float32 and round once.
    """
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        base.weight.copy_(merged_weight(model, f"{name}.base_layer.weight", in_float32=in_float32))
        model.set_submodule(name, base)
    return model
