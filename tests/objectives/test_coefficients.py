"""Coefficients that are changed between calls, and log-ratios too large to be exponentiated."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchrl.modules import ValueOperator

from torchrl_vla.objectives import AsymmetricClipPPOLoss

from .policy_table import make_actor, make_batch, random_batch, total


def test_terms_come_in_when_their_coefficients_are_raised():
    table, data = random_batch()
    critic = ValueOperator(nn.Linear(3, 1).double(), in_keys=[("vla_action", "hidden")])
    pieces = {"reference_context": table.disable_adapter, "bin_centers": torch.linspace(-1, 1, 5).double()}
    coefficients = {"entropy_coeff": 0.1, "kl_coeff": 0.2, "reconstruction_coeff": 0.3, "critic_coeff": 0.5}
    raised = AsymmetricClipPPOLoss(make_actor(table), critic, critic_coeff=0.0, **pieces)
    calls = table.calls
    assert [key for key in raised(data).keys() if key.startswith("loss_")] == ["loss_objective"]
    assert table.calls == calls + 1  # nor is the reference's forward done for nothing
    for name, value in coefficients.items():
        setattr(raised, name, value)
    expected = AsymmetricClipPPOLoss(make_actor(table), critic, **coefficients, **pieces)
    assert set(raised.out_keys) == set(expected.out_keys) == set(raised(data).keys())
    torch.testing.assert_close(dict(raised(data).items()), dict(expected(data).items()))
    raised.kl_coeff = 0.4
    assert raised(data)["loss_kl"].item() == pytest.approx(2 * expected(data)["loss_kl"].item(), rel=1e-6)
    raised.kl_coeff = 0.0
    assert raised(data)["loss_kl"].item() == 0


def test_terms_come_in_when_a_state_is_loaded():
    table, data = random_batch()
    pieces = {"reference_context": table.disable_adapter}
    saved = AsymmetricClipPPOLoss(make_actor(table), entropy_coeff=0.1, kl_coeff=0.2, **pieces)
    loaded = AsymmetricClipPPOLoss(make_actor(table), **pieces)
    loaded.load_state_dict(saved.state_dict())
    torch.testing.assert_close(dict(loaded(data).items()), dict(saved(data).items()))


@pytest.mark.parametrize(
    ("options", "name", "value", "message"),
    [
        ({}, "reconstruction_coeff", 0.1, r"reconstruction_coeff=0.1 needs bin_centers"),
        ({}, "critic_coeff", 0.1, r"critic_coeff=0.1 needs a critic_network"),
        ({"entropy_bonus": False}, "entropy_coeff", 0.1, r"entropy_coeff=0.1 needs entropy_bonus=True"),
        ({}, "kl_coeff", -0.1, r"kl_coeff=-0.1 must not be negative"),
        ({}, "kl_coeff", math.nan, r"kl_coeff=nan must not be negative"),
        ({}, "reduction", "avg", r"reduction='avg' is unknown: choose one of \('mean', 'sum', 'none'\)"),
    ],
)
def test_what_cannot_take_effect_is_refused(options, name, value, message):
    table, data = make_batch()
    loss = AsymmetricClipPPOLoss(make_actor(table), **options)
    with pytest.raises(ValueError, match=message):
        setattr(loss, name, value)
    assert [key for key in loss(data).keys() if key.startswith("loss_")] == ["loss_objective"]


def test_a_kl_without_a_reference_says_so_at_the_call():
    table, data = make_batch()
    loss = AsymmetricClipPPOLoss(make_actor(table))
    loss.kl_coeff = 0.1
    with pytest.raises(ValueError, match="kl_coeff=0.1.* needs a reference: pass reference_context"):
        loss(data)
    data["vla_action", "reference_log_probs"] = torch.full((2, 2, 2), -math.log(2))
    assert loss(data)["kl_reference"].item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
@pytest.mark.parametrize("shift", [50.0, 100.0, 1000.0, -100.0, -1000.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_large_log_ratios_have_finite_gradients(level, shift, dual_clip):
    table, data = random_batch()
    data["vla_action", "log_probs"] -= shift
    data["vla_action", "reference_log_probs"] = data["vla_action", "log_probs"] - shift
    loss = AsymmetricClipPPOLoss(make_actor(table), ratio_level=level, dual_clip=dual_clip, kl_coeff=0.1)
    terms = loss(data)
    total(terms).backward()
    assert all(value.isfinite() for value in terms.values())
    assert table.logits.grad.isfinite().all()


def test_a_ratio_is_limited_to_exp_20():
    table, data = make_batch(torch.full((1, 1, 1), 1.0), torch.tensor([[-1.0]]))
    data["vla_action", "log_probs"] -= 30
    terms = AsymmetricClipPPOLoss(make_actor(table))(data)
    assert terms["loss_objective"].item() == pytest.approx(math.exp(20), rel=1e-5)
    assert terms["max_ratio"].item() == terms["mean_ratio"].item() == pytest.approx(math.exp(20), rel=1e-5)
    assert terms["kl_approx"].item() == pytest.approx(-30, rel=1e-5)  # as far as it is


@pytest.mark.parametrize(("shift", "kl", "slope"), [(30.0, math.exp(20) - 21, 0.0), (-30.0, 29.0, 1.0)])
def test_the_kl_of_a_policy_far_from_its_reference(shift, kl, slope):
    """Where the reference finds an action far less likely, the gradient still pulls the policy back."""
    table, data = make_batch(torch.full((1, 1, 1), 1.0), torch.zeros(1, 1))
    data["vla_action", "reference_log_probs"] = torch.full((1, 1, 1), shift - math.log(2))
    terms = AsymmetricClipPPOLoss(make_actor(table), kl_coeff=1.0)(data)
    assert terms["kl_reference"].item() == pytest.approx(kl, rel=1e-5)
    total(terms).backward()
    assert table.logits.grad[0, 0, 0, 0].item() == pytest.approx(slope * 0.5, abs=1e-6)
