from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_openvla import random_model, small_config
from torch import Tensor

from torchrl_vla.checkpoints.openvla_format import upstream_tensors
from torchrl_vla.modules.openvla import (
    OpenVLA,
    OpenVLAConfig,
    add_lora,
    freeze_backbone,
    load_adapter,
    merge_lora,
    save_adapter,
    without_adapters,
)
from torchrl_vla.modules.openvla.linear import merged_weight
from torchrl_vla.modules.openvla.lora import adaptable_modules

EMPTY = 3


def adapted(model: OpenVLA | None = None, **options: object) -> OpenVLA:
    """A model with adapters that do something."""
    model = add_lora(model or random_model(), rank=4, **options)  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


def logits(model: OpenVLA) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    pixels, proprio = torch.randn(2, 6, 28, 28, generator=generator), torch.randn(2, 8, generator=generator)
    return model(pixels, torch.tensor([[1, 10, EMPTY], [1, 11, EMPTY]]), None, proprio).action_logits


def test_7b_adapter_is_upstreams_without_the_layers_that_never_run() -> None:
    with torch.device("meta"):
        model = add_lora(OpenVLA(OpenVLAConfig.seven_b()))
    found = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # OpenVLA prints 110,828,288 for rank 32: it also adapts SigLIP's pooling head and both towers' last blocks.
    pool = 32 * ((1152 + 1152) * 2 + (1152 + 2304) + (1152 + 4304) * 2)
    dino_block = 32 * ((1024 + 3072) + (1024 + 1024) + (1024 + 4096) * 2)
    siglip_block = 32 * ((1152 + 3456) + (1152 + 1152) + (1152 + 4304) * 2)
    assert found == 110_828_288 - pool - dino_block - siglip_block
    layer = model.get_submodule("vision_backbone.featurizer.layers.0.attention.qkv")
    assert tuple(layer.lora_A["default"].weight.shape) == (32, 1024)  # type: ignore[union-attr,index]
    assert layer.scaling["default"] == 16 / 32  # type: ignore[index,union-attr]


def test_new_adapters_change_nothing_and_alone_learn() -> None:
    model = random_model()
    before = logits(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, rank=4)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    logits(model).square().mean().backward()
    ups = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    assert all(p.grad is not None and p.grad.any() for p in ups.values())  # one for every adapted layer: all are run
    assert len(ups) == len(adaptable_modules(random_model()))
    optimizer.step()
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(p, frozen[name.replace(".base_layer.", ".")])
    assert (logits(model) - before).abs().max() > 1e-4


def test_initialisation_is_gaussian() -> None:
    model = add_lora(OpenVLA(OpenVLAConfig.tiny()), rank=32)
    down = torch.cat([p.flatten() for name, p in model.named_parameters() if ".lora_A." in name])
    assert abs(down.std().item() * 32 - 1) < 0.01  # normal with std 1 / rank
    assert abs((down.abs() * 32 > 2).float().mean().item() - 0.0455) < 0.003


@pytest.mark.parametrize(("rank", "alpha", "scaling"), [(32, 16, 0.5), (8, 16, 1.0), (64, 64, 0.25), (32, 8, 0.25)])
def test_alpha_is_capped(rank: int, alpha: int, scaling: float) -> None:
    model = add_lora(random_model(), rank=rank, alpha=alpha, target_modules=["q_proj"])
    layer = model.get_submodule("language_model.model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == scaling  # type: ignore[index,union-attr]


def test_the_reference_is_the_model_before_adapters() -> None:
    model = random_model()
    before = logits(model)
    adapted(model)
    after = logits(model)
    assert (after - before).abs().max() > 1e-2
    with without_adapters(model), torch.no_grad():
        torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    torch.testing.assert_close(logits(model), after, atol=0, rtol=0)
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)
    with pytest.raises(RuntimeError), without_adapters(model):
        raise RuntimeError
    torch.testing.assert_close(logits(model), after, atol=0, rtol=0)
    with pytest.raises(ValueError, match="no adapters to leave out"), without_adapters(random_model()):
        pass


def test_merging_and_exporting_give_the_adapted_model(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)  # the model itself is untouched
    exported = OpenVLA.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(exported), expected, atol=1e-4, rtol=1e-4)
    merge_lora(model)
    assert not any(".lora_" in name or ".base_layer." in name for name in model.state_dict())
    torch.testing.assert_close(logits(model), logits(exported), atol=0, rtol=0)


def test_merge_in_float32_rounds_once() -> None:
    model = adapted(random_model().to(torch.bfloat16), target_modules=["q_proj"])
    name = "language_model.model.layers.0.self_attn.q_proj.base_layer.weight"
    layer = model.get_submodule("language_model.model.layers.0.self_attn.q_proj")
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight  # type: ignore[index,union-attr]
    assert up.dtype == torch.float32
    exact = model.get_parameter(name).double() + up.double() @ down.double() * (4 / 4)
    once = (merged_weight(model, name).double() - exact).abs().sum()
    twice = (merged_weight(model, name, in_float32=False).double() - exact).abs().sum()
    assert once < twice
    assert (
        dict(upstream_tensors(model))["language_model.model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    )


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0}, "alpha must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"target_modules": ["wq"]}, "target module 'wq' fits no layer; the layers are called"),
        ({"target_modules": "qkv"}, "must be 'all-linear' or a list"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(random_model(), **options)


def test_adapters_are_added_once_and_needed_to_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(adapted())
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(random_model(), tmp_path)


def test_freezing_the_backbone_leaves_heads_and_adapters() -> None:
    model = random_model(use_l1_head=True).bfloat16()
    freeze_backbone(model)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "proprio_projector", "action_head",
    }  # fmt: skip
    adapted(model)
    freeze_backbone(model)
    assert any(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)


def test_checkpointing_and_adapters_go_together() -> None:
    model = adapted(random_model(small_config()))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        logits(model).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.train().gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=1e-5)
