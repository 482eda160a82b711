"""An OpenVLA small enough for any test, in all of whose parts something can go wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_vla.modules.openvla import OpenVLA, OpenVLAConfig, VisionTowerConfig, add_lora


def small_openvla_config(*, embed_dim: int = 32, **overrides: object) -> OpenVLAConfig:
    """Four patches per image, towers and language model of two layers.

    Args:
        embed_dim: width of both towers.
        overrides: other fields.
    """
    values: dict = dict(
        image_size=28,
        dinov2=VisionTowerConfig(embed_dim=embed_dim, depth=2, num_heads=2, num_prefix_tokens=5),
        siglip=VisionTowerConfig(embed_dim=embed_dim, depth=2, num_heads=2),
        hidden_size=2 * embed_dim,
        intermediate_size=4 * embed_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=2,
    )
    return OpenVLAConfig.tiny(**{**values, **overrides})


def decided_model(config: OpenVLAConfig) -> OpenVLA:
    """A model that prefers some tokens: initialised logits are flat."""
    torch.manual_seed(0)
    model = OpenVLA(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def small_config(**overrides: object) -> OpenVLAConfig:
    """A few thousand weights, of widths that differ everywhere so that a mix-up shows."""
    values: dict = dict(
        dinov2=VisionTowerConfig(embed_dim=24, depth=3, num_heads=3, num_prefix_tokens=5),
        siglip=VisionTowerConfig(embed_dim=20, depth=4, num_heads=2),
        hidden_size=16,
        intermediate_size=44,
        num_hidden_layers=3,
        vocab_size=352,
    )
    return small_openvla_config(**{**values, **overrides})


def random_model(config: OpenVLAConfig | None = None, **options: object) -> OpenVLA:
    """A model whose every parameter is random and large enough to matter."""
    torch.manual_seed(0)
    model = OpenVLA(config or small_config(), **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def adapted(model: OpenVLA | None = None, **options: object) -> OpenVLA:
    """A model with adapters that do something."""
    model = add_lora(model or random_model(), rank=4, **options)  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


def logits(model: OpenVLA) -> Tensor:
    """Of the action tokens, for inputs that are always the same."""
    generator = torch.Generator().manual_seed(2)
    pixels, proprio = torch.randn(2, 6, 28, 28, generator=generator), torch.randn(2, 8, generator=generator)
    return model(pixels, torch.tensor([[1, 10, 3], [1, 11, 3]]), None, proprio).action_logits
