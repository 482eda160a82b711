from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_openvla import small_config
from transformers import LlamaConfig

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
    written, upstream = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, checkpoint))
    # All that is added: upstream's files alone do not say which others they need.
    assert written.pop("torchrl_vla") == {"use_proprio": True, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert written == upstream
    towers = [json.loads((folder / "vit_overrides.json").read_text()) for folder in (tmp_path, checkpoint)]
    assert towers[0] == towers[1]


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
    if config.use_proprio:
        with pytest.raises(ValueError, match="lacks proprio_projector--N_checkpoint.pt, and config.json notes"):
            read_architecture(tmp_path)
        (tmp_path / "proprio_projector--0_checkpoint.pt").touch()
    assert replace(read_architecture(tmp_path), upstream={}) == config


def test_7b_config_leaves_llama_defaults_out(tmp_path: Path) -> None:
    write_architecture(OpenVLAConfig.seven_b(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert set(raw["text_config"]) == {"model_type", "pad_token_id", "torch_dtype", "vocab_size"}
    assert "torchrl_vla" not in raw
    assert not (tmp_path / "vit_overrides.json").exists()


def edited(checkpoint: Path, folder: Path, **changes: object) -> Path:
    """A copy of the small files in which `text_config.KEY` or a key of config.json is another."""
    if folder != checkpoint:
        for name in ("config.json", "vit_overrides.json"):
            shutil.copyfile(checkpoint / name, folder / name)
    raw = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        target = raw["text_config"] if name.startswith("text_") and name != "text_config" else raw
        target[name.removeprefix("text_") if target is not raw else name] = value
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("timm_model_ids", ["resnet50"]),
        ("timm_model_ids", 5),
        ("timm_override_act_layers", ["quick_gelu", None]),
        ("arch_specifier", "linear"),
        ("vision_backbone_id", "dinosiglip-vit-so-384px"),
        ("llm_backbone_id", "vicuna-v15-7b"),
        ("image_resize_strategy", "letterbox"),
        ("use_fused_vision_backbone", False),
        ("quantization_config", {"load_in_8bit": True}),
        ("tie_word_embeddings", True),
        ("text_model_type", "mistral"),
        ("text_hidden_act", "gelu"),
        ("text_attention_bias", True),
        ("text_attention_dropout", 0.1),
        ("text_mlp_bias", True),
        ("text_tie_word_embeddings", True),
        ("text_rope_theta", 1e6),
        ("text_rope_theta", True),
        ("text_rope_scaling", {"rope_type": "linear", "factor": 4.0}),
        ("text_rope_parameters", {"rope_type": "default", "rope_theta": 500000.0}),
        ("text_rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0}),
        ("text_partial_rotary_factor", 0.5),
        ("text_pretraining_tp", 2),
        ("text_sliding_window", 512),
    ],
)
def test_networks_that_are_not_built_are_refused(checkpoint: Path, tmp_path: Path, key: str, value: object) -> None:
    name = key.replace("text_", "text_config.")
    with pytest.raises(ValueError, match=rf"config.json: {name} is {re.escape(repr(value))}, but only .* is built"):
        read_architecture(edited(checkpoint, tmp_path, **{key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("text_head_dim", 32, "text_config.head_dim is 32, but the rest of the configuration makes it 8"),
        ("text_pad_token_id", 0, "text_config.pad_token_id is 0, but the rest of the configuration makes it 32000"),
        ("text_eos_token_id", 128001, "text_config.eos_token_id is 128001, .* makes it 2"),
        ("pad_token_id", 31999, "pad_token_id is 31999, .* makes it 32000"),
        ("n_action_bins", 128, "n_action_bins is 128, but the weights were trained with 256"),
        ("pad_to_multiple_of", 32, "pad_to_multiple_of is 32, but the weights were trained with 64"),
        ("text_rms_norm_eps", 1e-2, "rms_norm_eps is 0.01, but the weights were trained with 1e-06 or 1e-05"),
        ("image_sizes", [224, 384], r"image_sizes must be the same number twice.* got \[224, 384\]"),
        ("image_sizes", 224, "image_sizes must be the same number twice"),
        ("image_sizes", ["56", "56"], "value that this version cannot read .image_size must be a whole number"),
        ("text_vocab_size", "32064", "value that this version cannot read .vocab_size must be a whole number"),
        ("text_rms_norm_eps", float("inf"), "rms_norm_eps must be positive and finite"),
        ("text_num_attention_heads", 3, "config.json: hidden_size 16 must split into 3 heads"),
        ("text_config", [], "text_config must be an object"),
        ("norm_stats", ["bridge_orig"], "norm_stats must be an object"),
        ("torchrl_vla", {"chunk_size": 1000}, "chunk_size 1000 gives 7000 action tokens, .* exceed max_position"),
        ("torchrl_vla", {"chunk_size": 8.0}, "chunk_size must be a whole number, got 8.0"),
        ("torchrl_vla", {"hidden_size": 8}, "cannot read .torchrl_vla.hidden_size"),
    ],
)
def test_configurations_that_disagree_are_refused(
    checkpoint: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(edited(checkpoint, tmp_path, **{key: value}))


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", 4), ("rms_norm_eps", 1e-6)])
def test_what_no_shape_shows_is_noted_and_compared(tmp_path: Path, key: str, value: float) -> None:
    config = small_config(use_proprio=False, rms_norm_eps=1e-4, n_action_bins=128, pad_to_multiple_of=32)
    write_architecture(config, tmp_path)
    assert replace(read_architecture(tmp_path), upstream={}) == config
    with pytest.raises(ValueError, match=f"{key} is {value}, but the weights were trained with {getattr(config, key)}"):
        read_architecture(edited(tmp_path, tmp_path, **{f"text_{key}": value}))


def test_defaults_spelled_out_are_taken(checkpoint: Path, tmp_path: Path) -> None:
    """As other versions of transformers write them, and keys that say nothing of the network."""
    text = LlamaConfig(hidden_size=16, num_attention_heads=2).to_dict()
    changes = {f"text_{key}": text[key] for key in ("hidden_act", "attention_bias", "mlp_bias", "rope_parameters",
               "head_dim", "pretraining_tp", "bos_token_id", "eos_token_id", "attention_dropout")}  # fmt: skip
    folder = edited(
        checkpoint, tmp_path, **changes, text_rope_theta=10000, text_rope_scaling=None, text_use_cache=True,
        tie_word_embeddings=False, auto_map={"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
    )  # fmt: skip
    assert replace(read_architecture(folder), upstream={}) == replace(
        read_architecture(checkpoint), upstream={}, use_proprio=False, dataset_statistics={}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"resnet50": {}}, "resnet50 is {}; sizes of vit_large"),
        ({"vit_so400m_patch14_siglip_224": 3}, "vit_so400m_patch14_siglip_224 is 3"),
        ({"vit_so400m_patch14_siglip_224": {"wings": 2}}, "vit_overrides.json beside it, has a value .*wings"),
        ({"vit_so400m_patch14_siglip_224": {"depth": "5"}}, "depth must be a whole number, got '5'"),
    ],
)
def test_towers_that_cannot_be_built_are_refused(checkpoint: Path, tmp_path: Path, content: dict, message: str) -> None:
    folder = edited(checkpoint, tmp_path)
    (folder / "vit_overrides.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_architecture(folder)


@pytest.mark.parametrize("content", ["{}", "[]", "", "null"])
def test_an_empty_configuration_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json .*again"):
        read_architecture(tmp_path)


def test_missing_and_broken_config_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        read_architecture(tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    (tmp_path / "dataset_statistics.json").write_text("{")
    with pytest.raises(ValueError, match="dataset_statistics.json is not valid JSON"):
        read_architecture(tmp_path)
