from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

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


def test_upstream_defaults_and_overrides_are_read(checkpoint: Path) -> None:
    config = OpenVLAConfig.from_folder(checkpoint)
    assert config.use_proprio  # by the file
    assert config.rms_norm_eps == 1e-6  # absent in the file, and not Llama-2's 1e-5
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 3, 32064)
    assert config.dinov2 == VisionTowerConfig(embed_dim=24, depth=4, num_heads=3, num_prefix_tokens=5)
    assert config.siglip.mlp_dim == 74  # timm truncates 20 * 3.7362
    assert set(config.statistics) == {"bridge_orig", "libero_spatial_no_noops"}


def test_upstream_config_survives_a_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    OpenVLAConfig.from_folder(checkpoint).save(tmp_path)
    for name in ("config.json", "vit_overrides.json", "dataset_statistics.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((checkpoint / name).read_text())


def test_transformers_5_has_another_name_for_the_dtype(checkpoint: Path, tmp_path: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    for part in (raw, raw["text_config"]):
        part["dtype"] = {"bfloat16": "float16"}[part.pop("torch_dtype")]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = OpenVLAConfig.from_folder(tmp_path)
    assert config.torch_dtype == "float16"
    replace(config, torch_dtype="float32").save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert all(part["torch_dtype"] == "float32" and "dtype" not in part for part in (saved, saved["text_config"]))


@pytest.mark.parametrize("config", [OpenVLAConfig.tiny(num_images=2), OpenVLAConfig.seven_b(), small_config()])
def test_presets_survive_a_round_trip(config: OpenVLAConfig, tmp_path: Path) -> None:
    config.save(tmp_path)
    read = OpenVLAConfig.from_folder(tmp_path)
    assert replace(read, upstream={}) == replace(config, use_proprio=False)  # which the projector's file says


def test_7b_config_leaves_llama_defaults_out(tmp_path: Path) -> None:
    OpenVLAConfig.seven_b().save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert set(raw["text_config"]) == {"model_type", "pad_token_id", "torch_dtype", "vocab_size"}
    assert "torchrl_vla" not in raw
    assert not (tmp_path / "vit_overrides.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"timm_model_ids": ["resnet50"]}, "timm_model_ids are"),
        ({"image_sizes": [224, 384]}, "image_sizes"),
    ],
)
def test_other_models_are_refused(checkpoint: Path, tmp_path: Path, change: dict, message: str) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig.from_folder(tmp_path)


def test_missing_and_broken_config_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        OpenVLAConfig.from_folder(tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    (tmp_path / "dataset_statistics.json").write_text("{")
    with pytest.raises(ValueError, match="dataset_statistics.json is not valid JSON"):
        OpenVLAConfig.from_folder(tmp_path)
