from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_openvla import small_openvla_config
from torch import Tensor

from torchrl_vla.modules.openvla import OpenVLA, OpenVLAConfig, VisionTowerConfig

DATA = Path(__file__).parents[2] / "data" / "openvla"


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


@pytest.fixture
def model() -> OpenVLA:
    return random_model()


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Upstream's tiny checkpoint."""
    return DATA / "checkpoint"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Upstream's inputs, intermediates and outputs by file."""
    return lambda name: load_file(DATA / f"{name}.safetensors")
