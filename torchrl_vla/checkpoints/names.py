"""Upstream's names: how our parameters are called in an OpenVLA checkpoint, and which of its tensors we do not run."""

from __future__ import annotations

import torch
from torch import nn

from torchrl_vla.modules.openvla.architecture import OpenVLAConfig

__all__ = ["TOWERS", "parameter_names", "unused_shapes", "unused_weight", "upstream_name"]

TOWERS = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
# Prefixes of our parameters that upstream keeps in files of their own.
_HEADS = ("action_head.", "proprio_projector.")

# Applied in this order to names inside a tower; timm's names are on the right.
_TOWER_NAMES = (
    (".embeddings.proj.", ".patch_embed.proj."),
    (".embeddings.", "."),
    (".layers.", ".blocks."),
    (".attention.", ".attn."),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".layer_scale1.lambda1", ".ls1.scale_factor"),
    (".layer_scale2.lambda1", ".ls2.scale_factor"),
)


def upstream_name(name: str) -> str:
    """Upstream's name of one of our parameters (or of an adapter on it).

    Example:
        >>> upstream_name("vision_backbone.featurizer.layers.0.attention.qkv.weight")
        'vision_backbone.featurizer.blocks.0.attn.qkv.weight'
    """
    if name.startswith(TOWERS):
        for ours, theirs in _TOWER_NAMES:
            name = name.replace(ours, theirs)
    return name


def unused_shapes(config: OpenVLAConfig) -> dict[str, tuple[int, ...]]:
    """Shapes, by upstream's name, of the tensors that no forward reads.

    They are each tower's last block and final norm, and SigLIP's pooling head.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, tower in zip(TOWERS, (config.dinov2, config.siglip), strict=True):
        dim, hidden = tower.embed_dim, tower.mlp_dim
        mlp = {"fc1": (hidden, dim), "fc2": (dim, hidden)}
        block = f"{prefix}blocks.{tower.depth - 1}."
        linears = {f"{block}attn.qkv": (3 * dim, dim), f"{block}attn.proj": (dim, dim)}
        linears |= {f"{block}mlp.{name}": shape for name, shape in mlp.items()}
        norms = [f"{block}norm1", f"{block}norm2", f"{prefix}norm"]
        if tower.num_prefix_tokens:
            shapes |= {f"{block}{scale}.scale_factor": (dim,) for scale in ("ls1", "ls2")}
        else:
            pool = f"{prefix}attn_pool."
            shapes[f"{pool}latent"] = (1, 1, dim)
            linears |= {f"{pool}q": (dim, dim), f"{pool}kv": (2 * dim, dim), f"{pool}proj": (dim, dim)}
            linears |= {f"{pool}mlp.{name}": shape for name, shape in mlp.items()}
            norms.append(f"{pool}norm")
        for name, shape in linears.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for name in norms:
            shapes |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    return shapes


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Our name of every parameter in upstream's shards, by upstream's name (base weights only, no adapters)."""
    names = (name for name, _ in model.named_parameters() if not name.startswith(_HEADS) and ".lora_" not in name)
    return {upstream_name(name).replace(".base_layer.", "."): name for name in names}


def unused_weight(model: nn.Module, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor that no forward reads: as it was loaded, or zeros in a model that was not loaded."""
    stored = getattr(model, "unused_weights", {})
    if name in stored:
        return stored[name]
    reference = next(model.parameters())
    return torch.zeros(shape, dtype=reference.dtype, device="meta" if reference.is_meta else "cpu")
