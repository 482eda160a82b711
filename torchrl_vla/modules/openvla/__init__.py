"""OpenVLA and OpenVLA-OFT: configuration, model, checkpoints and adapters."""

from torchrl_vla.modules.openvla.checkpoint import resolve_checkpoint, upstream_tensors
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
    "merge_lora",
    "resolve_checkpoint",
    "save_adapter",
    "upstream_tensors",
    "without_adapters",
]
