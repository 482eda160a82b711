from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_openvla import small_config

from torchrl_vla.checkpoints.openvla_format import upstream_tensors
from torchrl_vla.modules.openvla import OpenVLA, OpenVLAConfig, VisionTowerConfig


def test_7b_is_the_released_model() -> None:
    config = OpenVLAConfig.preset("7b")
    assert (config.action_token_begin, config.tokenizer_vocab_size, config.pad_token_id) == (31744, 32000, 32000)
    assert (config.patches_per_image, config.vision_dim, config.siglip.mlp_dim) == (256, 2176, 4304)
    with torch.device("meta"):
        tensors = dict(upstream_tensors(OpenVLA(config)))
    assert len(tensors) == 982
    assert sum(tensor.numel() for tensor in tensors.values()) == 7_541_237_184
    assert tensors["vision_backbone.fused_featurizer.attn_pool.kv.weight"].shape == (2304, 1152)
    assert tensors["vision_backbone.featurizer.blocks.23.ls1.scale_factor"].shape == (1024,)
    assert tensors["projector.fc1.weight"].shape == (8704, 2176)


def test_tiny_has_every_part_of_the_7b_model() -> None:
    model = OpenVLA(OpenVLAConfig.preset("tiny"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_460_224
    assert model.proprio_projector is not None
    assert {type(module).__name__ for module in model.modules()} >= {
        "Dinov2WithRegistersLayer", "SiglipEncoderLayer", "LlamaDecoderLayer", "VisionProjector",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 30}, "image_size 30 is not a multiple of dinov2.patch_size 14"),
        ({"hidden_size": -1}, "hidden_size must be positive, got -1"),
        ({"hidden_size": 18, "num_attention_heads": 4}, "18 must split into 4 heads"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "heads of even width"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
        ({"vocab_size": 320}, "vocab_size 320 leaves no text tokens"),
        ({"pad_to_multiple_of": -1}, "pad_to_multiple_of must not be negative"),
        ({"empty_token_id": 400}, "empty_token_id 400 is outside 0..351"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of"),
        ({"chunk_size": 0}, "chunk_size must be positive"),
    ],
)
def test_bad_fields_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 1}, "depth must be at least 2"),
        ({"num_heads": 5}, "embed_dim 24 is not a multiple of num_heads 5"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
        ({"num_prefix_tokens": 1}, "num_prefix_tokens must be 0 or 5"),
        ({"patch_size": 0}, "patch_size must be positive"),
    ],
)
def test_bad_towers_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(VisionTowerConfig(embed_dim=24, depth=4, num_heads=3), **overrides)


def test_towers_cut_the_same_patches() -> None:
    with pytest.raises(ValueError, match="14 and 7 pixels"):
        small_config(siglip=VisionTowerConfig(embed_dim=20, depth=4, num_heads=2, patch_size=7))


def test_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ValueError, match="unknown preset '13b'; choose one of tiny, 7b"):
        OpenVLAConfig.preset("13b")
