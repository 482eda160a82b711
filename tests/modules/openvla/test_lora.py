from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_openvla import adapted, logits, random_model, small_config
from torch import Tensor

from torchrl_vla.checkpoints.openvla_format import load_openvla, save_openvla, upstream_tensors
from torchrl_vla.modules.openvla import (
    OpenVLA,
    OpenVLAConfig,
    add_lora,
    freeze_backbone,
    merge_lora,
    without_adapters,
)
from torchrl_vla.modules.openvla.linear import merged_weight
from torchrl_vla.modules.openvla.lora import adaptable_modules


@pytest.mark.slow
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
    save_openvla(model, tmp_path)
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)  # the model itself is untouched
    exported = load_openvla(tmp_path)
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


def test_adapters_are_added_once() -> None:
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(adapted())


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
