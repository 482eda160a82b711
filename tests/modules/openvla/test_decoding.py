"""Sampling in base OpenVLA's decoding: each token from its own conditional distribution, action tokens alone."""

from __future__ import annotations

import pytest
import torch
from small_openvla import random_model, small_config

from torchrl_vla.modules.openvla import OpenVLA

DRAWS, TEMPERATURE = 4000, 0.06


@pytest.fixture(scope="module")
def model() -> OpenVLA:
    return random_model(small_config(use_proprio=False))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, 6, 28, 28), torch.tensor([[1, 10, 12, 3]])


@torch.no_grad()
def conditional(model: OpenVLA, tokens: list[int]) -> torch.Tensor:
    """Probabilities of the next action token after those of the prompt and `tokens`, by a pass without cache."""
    pixels, ids = inputs()
    words = model.language_model.model.embed_tokens(torch.cat([ids, torch.tensor([tokens], dtype=torch.long)], dim=1))
    embeds = torch.cat([words[:, :1], model.projector(model.encode_images(pixels)), words[:, 1:]], dim=1)
    logits = model.language_model(inputs_embeds=embeds).logits[0, -1]
    return (logits[32 : 32 + 256] / TEMPERATURE).softmax(-1)


def test_each_token_follows_its_conditional_distribution(model: OpenVLA) -> None:
    pixels, ids = inputs()
    features = model.encode_images(pixels).detach().expand(DRAWS, -1, -1)
    torch.manual_seed(0)
    drawn = model.generate_autoregressive(
        None, ids.expand(DRAWS, -1), vision_features=features, temperature=TEMPERATURE
    )
    assert drawn.shape == (DRAWS, 7) and drawn.min() >= 32 and drawn.max() < 32 + 256
    prefix: list[int] = []
    rows = drawn
    for place in range(3):
        expected = conditional(model, prefix)
        found = torch.bincount(rows[:, place] - 32, minlength=256) / len(rows)
        # Neither one token nor all alike, and every frequency within five standard errors.
        assert 0.05 < expected.max() < 0.95
        errors = (expected * (1 - expected) / len(rows)).sqrt().clamp_min(1 / len(rows))
        assert ((found - expected).abs() < 5 * errors).all()
        prefix.append(32 + int(expected.argmax()))
        rows = rows[rows[:, place] == prefix[-1]]
        assert len(rows) > 100


def test_seed_and_temperature_decide(model: OpenVLA) -> None:
    pixels, ids = inputs()

    def draw(temperature: float, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate_autoregressive(pixels, ids, temperature=temperature)

    assert torch.equal(draw(1.0, 3), draw(1.0, 3)) and not torch.equal(draw(1.0, 3), draw(1.0, 4))
    assert torch.equal(draw(1e-6, 3), draw(1e-6, 4))
    assert torch.equal(draw(0.0, 3), model.generate_autoregressive(pixels, ids))
    with pytest.raises(ValueError, match="temperature must be finite and >= 0"):
        draw(-0.5, 0)
