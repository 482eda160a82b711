from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_openvla import adapted, logits, random_model

from torchrl_vla.checkpoints.adapters import load_adapter, save_adapter


def test_an_adapter_goes_out_and_in(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path, base_model="openvla/openvla-7b")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 4, "openvla/openvla-7b")
    # The names that peft resolves all-linear to on upstream's model, but for those of layers that never run.
    assert set(settings["target_modules"]) == {
        "qkv", "proj", "fc1", "fc2", "fc3", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "lm_head",
    }  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.vision_backbone."
    assert tensors[f"{prefix}featurizer.blocks.0.attn.qkv.lora_B.weight"].shape == (72, 4)
    assert tensors[f"{prefix}fused_featurizer.patch_embed.proj.lora_A.weight"].shape == (4, 3, 14, 14)
    again = load_adapter(random_model(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=0, rtol=0)


def test_upstreams_adapter_has_layers_that_never_run(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for dead in ("featurizer.blocks.2.attn.qkv", "fused_featurizer.attn_pool.kv"):
        tensors[f"base_model.model.vision_backbone.{dead}.lora_A.weight"] = torch.ones(4, 24)
        tensors[f"base_model.model.vision_backbone.{dead}.lora_B.weight"] = torch.zeros(72, 4)
    save_file(tensors, path)
    torch.testing.assert_close(logits(load_adapter(random_model(), tmp_path)), logits(model), atol=0, rtol=0)


def test_upstreams_adapter_has_the_weight_under_the_head(tmp_path: Path) -> None:
    """peft's save_pretrained writes it wherever lm_head is among the targets."""
    model = adapted()
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    head = "language_model.lm_head.base_layer.weight"
    tensors[f"base_model.model.{head}"] = torch.zeros_like(model.get_parameter(head))
    save_file(tensors, path)
    torch.testing.assert_close(logits(load_adapter(random_model(), tmp_path)), logits(model), atol=0, rtol=0)


def test_foreign_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_adapter(random_model(), tmp_path)
    save_adapter(adapted(target_modules=["q_proj"]), tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, settings = load_file(path), json.loads(config.read_text())

    save_file({f"base_model.model.other.{name}": tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match="is for other modules"):
        load_adapter(random_model(), tmp_path)
    save_file({name: tensor[..., :2].contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"lora_A.weight is \[4, 2\] in .*, but this model needs \[4, 16\]"):
        load_adapter(random_model(), tmp_path)
    save_file(tensors, path)
    for option in ({"use_dora": True}, {"alpha_pattern": {"q_proj": 32}}, {"lora_bias": True}):
        config.write_text(json.dumps(settings | option))
        with pytest.raises(ValueError, match=f"has {next(iter(option))}: only plain LoRA"):
            load_adapter(random_model(), tmp_path)
    config.write_text(json.dumps(settings | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="peft_type 'IA3'"):
        load_adapter(random_model(), tmp_path)
    config.write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(ValueError, match="adapter_config.json lacks lora_alpha"):
        load_adapter(random_model(), tmp_path)
    config.write_text("[")
    with pytest.raises(ValueError, match="adapter_config.json is not valid JSON"):
        load_adapter(random_model(), tmp_path)
    config.write_text(json.dumps(settings))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="adapter_model.safetensors is truncated"):
        load_adapter(random_model(), tmp_path)


def test_adapters_are_needed_to_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(random_model(), tmp_path)
