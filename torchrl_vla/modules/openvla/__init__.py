"""OpenVLA and OpenVLA-OFT: architecture, network and adapters."""

from torchrl_vla.modules.openvla.architecture import OpenVLAConfig, VisionTowerConfig
from torchrl_vla.modules.openvla.lora import add_lora, freeze_backbone, merge_lora, without_adapters
from torchrl_vla.modules.openvla.model import OpenVLA, OpenVLAOutput

__all__ = [
    "OpenVLA",
    "OpenVLAConfig",
    "OpenVLAOutput",
    "VisionTowerConfig",
    "add_lora",
    "freeze_backbone",
    "merge_lora",
    "without_adapters",
]
