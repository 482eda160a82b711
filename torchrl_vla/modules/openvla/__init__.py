"""OpenVLA and OpenVLA-OFT: configuration, model, checkpoints and adapters."""

from torchrl_vla.modules.openvla.checkpoint import load_pretrained, save_pretrained, upstream_tensors
from torchrl_vla.modules.openvla.config import OpenVLAConfig, VisionTowerConfig
from torchrl_vla.modules.openvla.lora import (
    add_lora,
    freeze_backbone,
    load_adapter,
    merge_lora,
    save_adapter,
    without_adapters,
)
from torchrl_vla.modules.openvla.model import OpenVLA, OpenVLAOutput

__all__ = [
    "OpenVLA",
    "OpenVLAConfig",
    "OpenVLAOutput",
    "VisionTowerConfig",
    "add_lora",
    "freeze_backbone",
    "load_adapter",
    "load_pretrained",
    "merge_lora",
    "save_adapter",
    "save_pretrained",
    "upstream_tensors",
    "without_adapters",
]
