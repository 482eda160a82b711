from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_openvla import adapted, logits, random_model

from torchrl_vla.checkpoints.adapters import load_adapter, save_adapter
from torchrl_vla.modules.openvla import merge_lora

#: Options that make more of an adapter than is added, or say that it belongs to another base.
OTHER_KINDS = {
    "use_dora": True,
    "use_rslora": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 4},
    "lora_bias": True,
    "bias": "lora_only",
    "fan_in_fan_out": True,
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 32},
    "modules_to_save": ["lm_head"],
    "layer_replication": [[0, 2], [1, 3]],
    "trainable_token_indices": [5],
    "target_parameters": ["experts.weight"],
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "kpm"},
    "alora_invocation_tokens": [1, 2],
    "an_option_of_next_year": 0.5,
}


@pytest.mark.parametrize("start", ["pissa", "olora", True, "gaussian"])
def test_an_adapter_that_learned_nothing_changes_nothing(tmp_path: Path, start: str | bool) -> None:
    """As peft's own files have it: either the weight stays what it is, or the adapter is refused."""
    name = "language_model.model.layers.0.self_attn.q_proj"
    model = random_model()
    before = model.get_parameter(f"{name}.weight").detach().clone()
    layer = torch.nn.Sequential()
    layer.add_module("q_proj", torch.nn.Linear(16, 16, bias=False))
    layer.q_proj.weight.data = before.clone()
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=start)
    get_peft_model(layer, settings).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("model.q_proj", f"model.{name}"): t for key, t in load_file(path).items()}, path)
    if start in ("pissa", "olora"):
        with pytest.raises(ValueError, match=f"has init_lora_weights '{start}'"):
            load_adapter(model, tmp_path)
        return
    merge_lora(load_adapter(model, tmp_path))
    assert torch.equal(model.get_parameter(f"{name}.weight"), before)


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
    weight = model.get_parameter(head).detach()
    save_file(tensors | {f"base_model.model.{head}": weight}, path)
    torch.testing.assert_close(logits(load_adapter(random_model(), tmp_path)), logits(model), atol=0, rtol=0)
    save_file(tensors | {f"base_model.model.{head}": weight + 1}, path)
    with pytest.raises(ValueError, match="lm_head.base_layer.weight, which is not this model's"):
        load_adapter(random_model(), tmp_path)


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
    for name, value in OTHER_KINDS.items():
        config.write_text(json.dumps(settings | {name: value}))
        with pytest.raises(ValueError, match=f"has {name}: only plain LoRA"):
            load_adapter(random_model(), tmp_path)
    for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"):
        config.write_text(json.dumps(settings | {"init_lora_weights": start}))
        with pytest.raises(ValueError, match=f"has init_lora_weights '{start}'.* out of the base model"):
            load_adapter(random_model(), tmp_path)
    for wrong in ({"r": "4"}, {"r": 0}, {"r": True}, {"lora_alpha": float("nan")}, {"lora_alpha": -1}):
        config.write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match=f"adapter_config.json: {next(iter(wrong))} must be a positive number"):
            load_adapter(random_model(), tmp_path)
    config.write_text(json.dumps(settings))
    bias = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_B.bias"
    save_file(tensors | {bias: torch.ones(16)}, path)
    with pytest.raises(ValueError, match="q_proj.lora_B.bias, which a plain LoRA adapter has no place for"):
        load_adapter(random_model(), tmp_path)
    spoiled = {name: tensor.clone() for name, tensor in tensors.items()}
    spoiled[next(iter(spoiled))][0] = float("nan")
    save_file(spoiled, path)
    with pytest.raises(ValueError, match="adapter_model.safetensors has .* numbers that are NaN or infinite"):
        load_adapter(random_model(), tmp_path)
    save_file(tensors, path)
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
