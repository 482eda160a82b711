"""PPO's update of an OpenVLA with adapters: what the micro-batch may not change, and where it begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_openvla import decided_model, small_openvla_config
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_vla.config import PPOConfig
from torchrl_vla.modules import (
    ActionTokenizer,
    OpenVLAActor,
    OpenVLAProcessor,
    build_tokenizer,
    make_actor,
)
from torchrl_vla.modules.openvla.lora import add_lora
from torchrl_vla.objectives import AsymmetricClipPPOLoss
from torchrl_vla.training.figures import step_figures
from torchrl_vla.training.optimizer_step import OptimizerStep

TASKS = ["open the top drawer", "put the black bowl on the plate and open the top drawer"]
COUNT = 6


def make_policy() -> OpenVLAActor:
    """Two prompts of different length, so that rows are padded; adapters that matter."""
    config = small_openvla_config()
    model = decided_model(config)
    with torch.no_grad():
        add_lora(model, rank=4)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05)
    tokenizer = build_tokenizer(TASKS, vocab_size=config.tokenizer_vocab_size)
    processor = OpenVLAProcessor(tokenizer, ActionTokenizer(), image_size=28, backend="fast")
    return make_actor(model.eval(), processor, temperature=1.6)


def make_decisions(actor: OpenVLAActor) -> TensorDictBase:
    """A rollout, its log-probabilities those of a batch of all."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (COUNT, 3, 32, 32), dtype=torch.uint8, generator=generator)
    observation = TensorDict({"image": images, "state": torch.rand(COUNT, 8, generator=generator)}, [COUNT])
    instructions = [TASKS[index % 2] for index in range(COUNT)]
    with torch.no_grad():
        data = actor(TensorDict({"observation": observation, "language_instruction": instructions}, [COUNT]))
    data["advantage"] = torch.linspace(-1, 1, COUNT)[:, None]
    data["next", "done"] = torch.arange(COUNT)[:, None] == COUNT - 1
    return data


def update(batch_size: int, *, accelerated: bool = False, **values: Any) -> tuple[dict, dict[str, Tensor]]:
    """The figures and the gradient of one optimizer step."""
    actor = make_policy()
    model = actor.backbone.model
    if accelerated:
        model.accelerate(compile_layers=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    # Nothing is clipped, and all decisions are one mini-batch.
    config = PPOConfig(n_epochs=1, traj_split_num=1, batch_size=batch_size, val_interval=0, max_grad_norm=1e9, **values)
    loss = AsymmetricClipPPOLoss(actor, None, entropy_coeff=config.entropy_coef)
    step = OptimizerStep(loss, optimizer, config, set_recompute=model.gradient_checkpointing_enable)
    figures = step_figures([step(make_decisions(actor))])
    assert step.optimizer_steps == 1
    return figures, {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_gradient_does_not_depend_on_the_micro_batch(accelerated: bool) -> None:
    _, expected = update(COUNT, entropy_coef=0.01, gradient_checkpointing=0.0)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for batch_size, recompute in ((1, 0.0), (4, 1.0), (COUNT, 0.5)):
        _, found = update(batch_size, accelerated=accelerated, entropy_coef=0.01, gradient_checkpointing=recompute)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_first_step_begins_where_the_rollout_was(batch_size: int) -> None:
    figures, _ = update(batch_size, accelerated=True)
    assert figures["train/max_ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["train/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert figures["train/clipfrac"] == 0
