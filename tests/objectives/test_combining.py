"""A batch in micro-batches: gradients and figures are those of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchrl_vla.objectives import AsymmetricClipPPOLoss
from torchrl_vla.objectives.combining import combine

from .policy_table import make_actor, make_batch, random_batch, total, with_every_term


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_gradient_does_not_depend_on_the_micro_batch(level, micro_batch):
    table, data = random_batch()
    loss = with_every_term(table, level)

    def gradient(micro_batch: int) -> Tensor:
        loss.zero_grad()
        for part in data.split(micro_batch):
            total(loss(part)).backward()
        return torch.cat([p.grad.flatten() for p in loss.parameters()])

    whole = gradient(len(data))
    assert (gradient(micro_batch) - whole).abs().max() > 1e-2  # a plain mean does depend on it
    loss.set_normalizer(loss.count_valid(data))
    torch.testing.assert_close(gradient(micro_batch), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(len(data)), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_combined_terms_are_those_of_the_batch(level, micro_batch):
    """The first micro-batch of one decision has nothing valid."""
    table, data = random_batch()
    data["value_target"] += 1000
    loss = with_every_term(table, level)
    whole = loss(data)
    loss.set_normalizer(loss.count_valid(data))
    combined = combine([loss(part) for part in data.split(micro_batch)])
    assert set(combined) == set(whole.keys()) == set(loss.out_keys)
    for key, value in combined.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-6, msg=key, check_dtype=False)


def test_combined_terms_of_nothing_valid_are_finite():
    table, data = make_batch()
    data["mask"] = torch.zeros(2, 2, dtype=torch.bool)
    loss = AsymmetricClipPPOLoss(make_actor(table))
    loss.set_normalizer(loss.count_valid(data))
    assert all(value == 0 for value in combine([loss(part) for part in data.split(1)]).values())
