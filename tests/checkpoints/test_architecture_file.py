from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_openvla import small_config

from torchrl_vla.checkpoints.architecture_file import read_architecture, write_architecture
from torchrl_vla.modules.openvla import OpenVLAConfig, VisionTowerConfig


def test_upstream_defaults_and_overrides_are_read(checkpoint: Path) -> None:
    config = read_architecture(checkpoint)
    assert config.use_proprio  # by the file
    assert config.rms_norm_eps == 1e-6  # absent in the file, and not Llama-2's 1e-5
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 3, 32064)
    assert config.dinov2 == VisionTowerConfig(embed_dim=24, depth=4, num_heads=3, num_prefix_tokens=5)
    assert config.siglip.mlp_dim == 74  # timm truncates 20 * 3.7362
    assert set(config.norm_stats) == {"bridge_orig"} and set(config.statistics) == {"libero_spatial_no_noops"}


def test_upstream_config_survives_a_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    write_architecture(read_architecture(checkpoint), tmp_path)
    for name in ("config.json", "vit_overrides.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((checkpoint / name).read_text())


def test_transformers_5_has_another_name_for_the_dtype(checkpoint: Path, tmp_path: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    for part in (raw, raw["text_config"]):
        part["dtype"] = {"bfloat16": "float16"}[part.pop("torch_dtype")]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_architecture(tmp_path)
    assert config.torch_dtype == "float16"
    write_architecture(replace(config, torch_dtype="float32"), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert all(part["torch_dtype"] == "float32" and "dtype" not in part for part in (saved, saved["text_config"]))


@pytest.mark.parametrize("config", [OpenVLAConfig.tiny(num_images=2), OpenVLAConfig.seven_b(), small_config()])
def test_presets_survive_a_round_trip(config: OpenVLAConfig, tmp_path: Path) -> None:
    write_architecture(config, tmp_path)
    read = read_architecture(tmp_path)
    assert replace(read, upstream={}) == replace(config, use_proprio=False)  # which the projector's file says


def test_7b_config_leaves_llama_defaults_out(tmp_path: Path) -> None:
    write_architecture(OpenVLAConfig.seven_b(), tmp_path)
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
        read_architecture(tmp_path)


def test_missing_and_broken_config_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        read_architecture(tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    (tmp_path / "dataset_statistics.json").write_text("{")
    with pytest.raises(ValueError, match="dataset_statistics.json is not valid JSON"):
        read_architecture(tmp_path)
