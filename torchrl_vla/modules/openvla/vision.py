"""The two vision towers of OpenVLA and the projector that brings their features to the language model's width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2WithRegistersConfig, SiglipVisionConfig
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from torchrl_vla.modules.openvla.architecture import OpenVLAConfig, VisionTowerConfig
from torchrl_vla.modules.openvla.attention import Attention
from torchrl_vla.modules.openvla.blocks import (
    LayerStack,
    ViTBlock,
    fuse_vit_layer,
    read_dinov2_layer,
    read_siglip_layer,
)
from torchrl_vla.modules.openvla.linear import linear, read_linear

# Images up to which a tower leaves much of a GPU idle, so that in a CUDA graph both run side by side.
_SIDE_BY_SIDE = 2


class FusedSelfAttention(nn.Module):
    """The weights of a self-attention whose query, key and value come from one linear layer.

    timm, and so upstream's LoRA, has it that way. It takes the place of the attention in transformers' ViT layers.

    Args:
        width: of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class PatchEmbeddings(nn.Module):
    """Patches of an image plus their positions, after DINOv2's class and register tokens where the tower has them.

    Args:
        config: the tower.
        image_size: side of the image in pixels.
    """

    def __init__(self, config: VisionTowerConfig, image_size: int) -> None:
        super().__init__()
        dim, patch = config.embed_dim, config.patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, dim))
        self.num_prefix_tokens = config.num_prefix_tokens
        if config.num_prefix_tokens:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
            self.reg_token = nn.Parameter(torch.empty(1, config.num_prefix_tokens - 1, dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] normalised pixels to [B, prefix + N, D]."""
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2) + self.pos_embed
        if not self.num_prefix_tokens:
            return patches
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(patches), -1, -1)
        return torch.cat([prefix, patches], dim=1)


class VisionTower(nn.Module):
    """A ViT up to its second-to-last block, without the final norm: the patch features that OpenVLA reads.

    The last block, the final norm and SigLIP's pooling head are not built; the checkpoint module carries their weights.

    Args:
        config: the tower; DINOv2 (with LayerScale) if it has prefix tokens, else SigLIP.
        image_size: side of the image in pixels.
        attn_implementation: transformers' name of the attention kernel.
    """

    def __init__(self, config: VisionTowerConfig, image_size: int, attn_implementation: str) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config, image_size)
        shared: dict[str, Any] = dict(
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            image_size=image_size,
            patch_size=config.patch_size,
            attn_implementation=attn_implementation,
        )
        tower_config: Any = (
            Dinov2WithRegistersConfig(**shared)
            if config.num_prefix_tokens
            else SiglipVisionConfig(**shared, intermediate_size=config.mlp_dim)
        )
        self.layers = nn.ModuleList()
        for _ in range(config.depth - 1):
            layer: Any
            if config.num_prefix_tokens:
                layer = Dinov2WithRegistersLayer(tower_config)
                layer.attention = FusedSelfAttention(config.embed_dim)
                # transformers only knows whole ratios; timm's hidden width is exact.
                layer.mlp.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
                layer.mlp.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)
            else:
                layer = SiglipEncoderLayer(tower_config)
                layer.self_attn = FusedSelfAttention(config.embed_dim)
            self.layers.append(layer)
        block = ViTBlock(Attention(tower_config, config.embed_dim // config.num_heads), eps=1e-6)
        self.stack = LayerStack(
            self.layers, read_dinov2_layer if config.num_prefix_tokens else read_siglip_layer, block, fuse_vit_layer
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] normalised pixels to [B, N, D] patch features."""
        hidden_states = self.stack(self.embeddings(pixel_values))
        return hidden_states[:, self.embeddings.num_prefix_tokens :]


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP side by side; their features are concatenated, DINOv2 first.

    Args:
        config: the model.
        attn_implementation: transformers' name of the attention kernel.
    """

    def __init__(self, config: OpenVLAConfig, attn_implementation: str) -> None:
        super().__init__()
        self.featurizer = VisionTower(config.dinov2, config.image_size, attn_implementation)
        self.fused_featurizer = VisionTower(config.siglip, config.image_size, attn_implementation)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of one or more images.

        Args:
            pixel_values: [B, 6k, H, W]; of each image's 6 channels the first 3 are normalised for DINOv2, the last 3
                for SigLIP.

        Returns:
            [B, k*N, D_dino + D_siglip], the images' patches one after the other.
        """
        batch, channels, height, width = pixel_values.shape
        images = pixel_values.reshape(batch * (channels // 6), 6, height, width)
        recorded = images.is_cuda and torch.cuda.is_current_stream_capturing() and not torch.is_grad_enabled()
        if recorded and len(images) <= _SIDE_BY_SIDE:
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                siglip = self.fused_featurizer(images[:, 3:])
            dinov2 = self.featurizer(images[:, :3])
            current.wait_stream(side)
        else:
            dinov2, siglip = self.featurizer(images[:, :3]), self.fused_featurizer(images[:, 3:])
        features = torch.cat([dinov2, siglip], dim=-1)
        return features.reshape(batch, -1, features.shape[-1])


class VisionProjector(nn.Module):
    """``fc3(gelu(fc2(gelu(fc1(x)))))`` with exact GELU; the first hidden layer is four times as wide as its input.

    Args:
        vision_dim: width of the concatenated features.
        hidden_size: width of the language model.
    """

    def __init__(self, vision_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """[..., vision_dim] to [..., hidden_size]."""
        states = features
        for layer in (self.fc1, self.fc2):
            states = F.gelu(linear(states, read_linear(layer)))
        return linear(states, read_linear(self.fc3))
