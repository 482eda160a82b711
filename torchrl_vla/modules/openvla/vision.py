"""The two vision towers of OpenVLA and the projector that brings their features to the language model's width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2WithRegistersConfig, SiglipVisionConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, eager_attention_forward

from torchrl_vla.modules.openvla.config import OpenVLAConfig, VisionTowerConfig


class FusedSelfAttention(nn.Module):
    """Self-attention whose query, key and value come from one linear layer, as timm (and so upstream's LoRA) has it.

    It takes the place of the attention in transformers' ViT layers and goes through the same attention interface.

    Args:
        config: the transformers configuration of the tower; its attention kernel is used.
    """

    is_causal = False

    def __init__(self, config: Dinov2WithRegistersConfig | SiglipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Attend over ``hidden_states`` [B, N, D]; returns [B, N, D] and None in place of the attention weights."""
        batch, tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(
            self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0, is_causal=False
        )
        return self.proj(output.reshape(batch, tokens, -1)), None


class DINOv2Layer(Dinov2WithRegistersLayer):
    """transformers' layer with its forward spelled out: what it passes to its attention differs between versions."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        attended = self.attention(self.norm1(hidden_states))[0]
        hidden_states = self.layer_scale1(attended) + hidden_states
        return self.layer_scale2(self.mlp(self.norm2(hidden_states))) + hidden_states


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
        # SigLIP's layers insist on a mask.
        self._layer_arguments = {} if config.num_prefix_tokens else {"attention_mask": None}
        self.layers = nn.ModuleList()
        for _ in range(config.depth - 1):
            layer: Any
            if config.num_prefix_tokens:
                dino_config = Dinov2WithRegistersConfig(**shared)
                layer = DINOv2Layer(dino_config)
                layer.attention = FusedSelfAttention(dino_config)
                # transformers only knows whole ratios; timm's hidden width is exact.
                layer.mlp.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
                layer.mlp.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)
            else:
                siglip_config = SiglipVisionConfig(**shared, intermediate_size=config.mlp_dim)
                layer = SiglipEncoderLayer(siglip_config)
                layer.self_attn = FusedSelfAttention(siglip_config)
            self.layers.append(layer)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] normalised pixels to [B, N, D] patch features."""
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **self._layer_arguments)
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
        features = torch.cat([self.featurizer(images[:, :3]), self.fused_featurizer(images[:, 3:])], dim=-1)
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
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))
