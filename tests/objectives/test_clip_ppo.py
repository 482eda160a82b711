"""AsymmetricClipPPOLoss against numbers worked out by hand, and against TorchRL's own loss where they must agree."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss

from torchrl_vla.objectives import AsymmetricClipPPOLoss
from torchrl_vla.objectives.combining import combine

from .policy_table import RATIOS, make_actor, make_batch, random_batch, total


@pytest.mark.parametrize(
    ("level", "objective", "clip_fraction", "mean_ratio", "max_ratio"),
    [
        # token: gains 1.28 .5 1.1 1.2 | -3 -1.6 -1.8 -2
        ("token", 0.54, 4 / 8, 8.2 / 8, 1.5),
        # action: ratios .75 1.32 | .75 .9, gains .75 1.28 | -1.6 -1.8
        ("action", 0.3425, 3 / 4, 3.72 / 4, 1.32),
        # chunk: ratios .99 | .675, gains .99 | -1.6
        ("chunk", 0.305, 1 / 2, 1.665 / 2, 0.99),
    ],
)
def test_ratio_levels_by_hand(level, objective, clip_fraction, mean_ratio, max_ratio):
    table, data = make_batch()
    terms = AsymmetricClipPPOLoss(make_actor(table), ratio_level=level)(data)
    assert terms["loss_objective"].item() == pytest.approx(objective, abs=1e-6)
    assert terms["clip_fraction"].item() == pytest.approx(clip_fraction)
    assert terms["mean_ratio"].item() == pytest.approx(mean_ratio)
    assert terms["max_ratio"].item() == pytest.approx(max_ratio)
    assert terms["entropy"].item() == pytest.approx(math.log(2))


def test_diagnostics_by_hand():
    table, data = make_batch()
    terms = AsymmetricClipPPOLoss(make_actor(table))(data)
    assert terms["ESS"].item() == pytest.approx(8.2**2 / 9.46 / 8)
    assert terms["kl_approx"].item() == pytest.approx(-RATIOS.log().mean().item())
    assert terms["num_ratios"].item() == 8
    assert not any(value.requires_grad for key, value in terms.items() if not key.startswith("loss_"))


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.27, 1, True), (1.29, 1, False), (0.5, 1, True), (0.81, -1, True), (0.79, -1, False), (2.0, -1, True)],
)
def test_the_clip_is_asymmetric_and_stops_the_gradient(ratio, advantage, moves):
    table, data = make_batch(torch.full((1, 1, 1), ratio), torch.full((1, 1), float(advantage)))
    AsymmetricClipPPOLoss(make_actor(table))(data)["loss_objective"].backward()
    # d(-r A)/d(logit of the token) = -r A (1 - p), with p = 1/2.
    expected = -ratio * advantage * 0.5 if moves else 0.0
    assert table.logits.grad[0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_dual_clip_bounds_negative_advantages_only():
    ratios, advantage = torch.tensor([5.0, 5.0]).reshape(2, 1, 1), torch.tensor([[-2.0], [2.0]])
    table, data = make_batch(ratios, advantage)
    plain = AsymmetricClipPPOLoss(make_actor(table))(data)["loss_objective"]
    assert plain.item() == pytest.approx(-(-10 + 2 * 1.28) / 2, abs=1e-5)
    dual = AsymmetricClipPPOLoss(make_actor(table), dual_clip=3.0)(data)["loss_objective"]
    assert dual.item() == pytest.approx(-(-6 + 2 * 1.28) / 2, abs=1e-5)
    dual.backward()
    assert table.logits.grad.abs().sum() == 0


@pytest.mark.parametrize("event_dims", [0, 2])
def test_agrees_with_torchrl_where_both_apply(event_dims):
    table, data = random_batch()
    data = data.exclude("mask")
    if event_dims:
        data["vla_action", "log_probs"] = data["vla_action", "log_probs"].sum((-1, -2))
    actor = make_actor(table, event_dims)
    stock = ClipPPOLoss(actor, clip_epsilon=(0.2, 0.28), entropy_coeff=0.02, functional=False)
    ours = AsymmetricClipPPOLoss(actor, ratio_level="chunk" if event_dims else "token", entropy_coeff=0.02)
    expected, terms = stock(data), ours(data)
    for key in ("loss_objective", "loss_entropy", "clip_fraction", "kl_approx", "mean_ratio", "max_ratio", "entropy"):
        torch.testing.assert_close(terms[key], expected[key].squeeze(), msg=key)
    if event_dims:
        torch.testing.assert_close(terms["ESS"], expected["ESS"].squeeze())


def test_chunk_ratio_is_the_same_from_token_and_from_summed_log_probs():
    table, data = random_batch()
    data = data.exclude("mask")
    summed = data.clone()
    summed["vla_action", "log_probs"] = data["vla_action", "log_probs"].sum((-1, -2))
    per_token = AsymmetricClipPPOLoss(make_actor(table), ratio_level="chunk")(data)
    per_chunk = AsymmetricClipPPOLoss(make_actor(table, 2), ratio_level="chunk")(summed)
    for key in ("loss_objective", "ESS", "clip_fraction", "kl_approx"):
        torch.testing.assert_close(per_token[key], per_chunk[key])


@pytest.mark.parametrize("mask_key", ["mask", ("collector", "mask")])
@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_masked_entries_count_nowhere(mask_key, level):
    """A batch with a masked decision gives the numbers of the batch without it."""
    table, data = random_batch()
    data = data.exclude("mask")
    kept = [1, 2, 4, 5, 7, 8]
    data[mask_key] = torch.zeros(9, 1, dtype=torch.bool)
    data[mask_key][kept] = True
    critic = ValueOperator(nn.Linear(3, 1).double(), in_keys=[("vla_action", "hidden")])
    coeffs = {"entropy_coeff": 0.1, "kl_coeff": 0.1, "clip_value": 0.2, "reconstruction_coeff": 0.1}
    loss = AsymmetricClipPPOLoss(
        make_actor(table),
        critic,
        ratio_level=level,
        reference_context=table.disable_adapter,
        bin_centers=torch.linspace(-1, 1, 5).double(),
        **coeffs,
    )
    expected = loss(data[kept].exclude(mask_key))
    terms = loss(data)
    assert set(terms.keys()) == set(loss.out_keys) == set(expected.keys())
    for key in terms.keys():
        torch.testing.assert_close(terms[key], expected[key], msg=key)


def test_partial_masks_by_hand():
    table, data = make_batch()
    data["mask"] = torch.tensor([[True, False], [False, True]])
    # tokens left: ratios 1.5 .5 with A=1, .9 1 with A=-2
    terms = AsymmetricClipPPOLoss(make_actor(table))(data)
    assert terms["loss_objective"].item() == pytest.approx(-(1.28 + 0.5 - 1.8 - 2) / 4)
    assert terms["clip_fraction"].item() == pytest.approx(2 / 4)
    assert terms["ESS"].item() == pytest.approx(3.9**2 / (2.25 + 0.25 + 0.81 + 1) / 4)
    chunk = AsymmetricClipPPOLoss(make_actor(table), ratio_level="chunk")(data)
    # chunk ratios of what is left: .75 with A=1, .9 with A=-2
    assert chunk["loss_objective"].item() == pytest.approx(-(0.75 - 1.8) / 2)
    assert chunk["num_ratios"].item() == 2


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_masked_garbage_has_no_gradient(level):
    table, data = random_batch()
    data["mask"] = data["mask"].unsqueeze(-1).expand(9, 2, 3).clone()
    data["vla_action", "reference_log_probs"] = data["vla_action", "log_probs"] - 0.1
    centers = torch.linspace(-1, 1, 5).double()
    critic = ValueOperator(nn.Linear(1, 1).double(), in_keys=["state_value"], out_keys=["value"])

    def gradients(data: TensorDict) -> tuple[Tensor, Tensor]:
        loss = AsymmetricClipPPOLoss(
            make_actor(table),
            critic,
            ratio_level=level,
            entropy_coeff=0.1,
            kl_coeff=0.1,
            reconstruction_coeff=0.1,
            bin_centers=centers,
            dual_clip=3.0,
        )
        loss.set_keys(value="value")
        loss.zero_grad()
        terms = loss(data)
        total(terms).backward()
        return table.logits.grad.clone(), torch.stack(list(terms.values()))

    expected_gradient, expected_terms = gradients(data)
    invalid = ~data["mask"]
    broken = data.clone()
    for key, garbage in {"log_probs": torch.nan, "reference_log_probs": torch.inf, "chunk": torch.nan}.items():
        broken["vla_action", key][invalid] = garbage
    broken["vla_action", "tokens"][invalid] = -100
    broken["advantage"][0] = torch.nan
    broken["value_target"][0] = torch.inf
    table.logits.data[invalid] = torch.nan
    gradient, terms = gradients(broken)
    assert (gradient[invalid] == 0).all()
    torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(terms, expected_terms)


def test_a_batch_with_nothing_valid_is_zero_and_finite():
    table, data = make_batch()
    data["mask"] = torch.zeros(2, 2, dtype=torch.bool)
    terms = AsymmetricClipPPOLoss(make_actor(table), entropy_coeff=0.1)(data)
    total(terms).backward()
    assert all(value == 0 for value in terms.values())
    assert (table.logits.grad == 0).all()


def test_kl_to_the_reference_by_hand():
    table, data = make_batch()
    # The reference gives the token twice its probability of 1/2: k3 = 2 - log 2 - 1, d/d(log p) = 1 - 2.
    data["vla_action", "reference_log_probs"] = torch.zeros(2, 2, 2)
    terms = AsymmetricClipPPOLoss(make_actor(table), kl_coeff=0.5)(data)
    assert terms["kl_reference"].item() == pytest.approx(1 - math.log(2))
    assert terms["loss_kl"].item() == pytest.approx(0.5 * (1 - math.log(2)))
    terms["loss_kl"].backward()
    assert table.logits.grad[..., 0].flatten().tolist() == pytest.approx([0.5 * (1 - 2) * 0.5 / 8] * 8)


def test_the_reference_is_the_actor_without_its_adapter():
    table, data = make_batch()
    loss = AsymmetricClipPPOLoss(make_actor(table), kl_coeff=1.0, reference_context=table.disable_adapter)
    assert loss(data)["kl_reference"].item() == pytest.approx(0, abs=1e-7)
    table.adapter.data.fill_(1.0)
    log_ratio = math.log(0.5) - math.log(math.e / (math.e + 1))
    terms = loss(data)
    assert terms["kl_reference"].item() == pytest.approx(math.exp(log_ratio) - log_ratio - 1, rel=1e-5)
    assert table.adapter_enabled and terms["loss_kl"].requires_grad
    stored = data.clone().set(("vla_action", "reference_log_probs"), loss.reference_log_prob(data))
    calls = table.calls
    torch.testing.assert_close(loss(stored)["loss_kl"], terms["loss_kl"])
    assert table.calls == calls + 1  # stored log-probabilities spare the second forward


def test_reconstruction_by_hand_and_its_gradient():
    table, data = make_batch()
    data["vla_action", "chunk"] = torch.full((2, 2, 2), 0.75)
    centers = torch.tensor([-1.0, 0.5])  # expectation -0.25 under the uniform distribution
    loss = AsymmetricClipPPOLoss(make_actor(table), reconstruction_coeff=0.1, bin_centers=centers)
    term = loss(data)["loss_reconstruction"]
    assert term.item() == pytest.approx(0.1)
    term.backward()
    # d(e)/d(logit 1) = p1 (c1 - e) = 0.5 * 0.75; 2 * (e - t) * that / 8 * 0.1
    assert table.logits.grad[0, 0, 0, 1].item() == pytest.approx(2 * -1 * 0.375 / 8 * 0.1)
    taken = data.exclude(("vla_action", "chunk"))
    taken["vla_action", "tokens"] = torch.tensor([[[0, 0], [0, 0]], [[0, 0], [1, 1]]])  # errors 0.75 six times of eight
    assert loss(taken)["loss_reconstruction"].item() == pytest.approx(0.1 * 0.75**2)
    taken["mask"] = torch.tensor([[True, True], [True, False]])
    taken["vla_action", "tokens"][1, 1] = -100
    assert loss(taken)["loss_reconstruction"].item() == pytest.approx(0.1 * 0.75**2)


def test_the_critic_reads_what_the_actor_wrote():
    table, data = make_batch()
    data["value_target"], data["state_value"] = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.1], [0.5]])
    head = nn.Linear(3, 1)
    head.weight.data.zero_()
    head.bias.data.fill_(0.5)
    critic = ValueOperator(head, in_keys=[("vla_action", "hidden")])
    loss = AsymmetricClipPPOLoss(make_actor(table), critic, critic_coeff=0.5)
    terms = loss(data)
    assert table.calls == 1
    assert terms["value_loss"].item() == pytest.approx((0.5**2 + 1.5**2) / 2)  # without its coefficient
    assert not terms["value_loss"].requires_grad
    assert terms["loss_critic"].item() == pytest.approx(0.5 * (0.5**2 + 1.5**2) / 2)
    assert terms["explained_variance"].item() == pytest.approx(0, abs=1e-6)
    # clip 0.2: values .5 -> .3 for the first, whose error is then .7; the second stays
    clipped = AsymmetricClipPPOLoss(make_actor(table), critic, clip_value=0.2)(data)
    assert clipped["loss_critic"].item() == pytest.approx((0.7**2 + 1.5**2) / 2)
    assert clipped["value_clip_fraction"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("separate", [False, True])
def test_separate_losses_keep_the_critic_from_the_actor(separate):
    table, data = random_batch()
    critic = ValueOperator(nn.Linear(3, 1).double(), in_keys=[("vla_action", "hidden")])
    loss = AsymmetricClipPPOLoss(make_actor(table), critic, separate_losses=separate)
    loss(data)["loss_critic"].backward()
    reached = table.logits.grad is not None and bool(table.logits.grad.abs().sum() > 0)
    assert reached is not separate


def test_the_batch_is_left_as_it_was():
    table, data = random_batch()
    keys = set(data.keys(True, True))
    AsymmetricClipPPOLoss(make_actor(table), kl_coeff=0.1, reference_context=table.disable_adapter)(data)
    assert set(data.keys(True, True)) == keys


def test_no_host_synchronisation():
    """Every term runs on the meta device, where reading a value is an error."""
    table, data = random_batch()
    critic = ValueOperator(nn.Linear(3, 1).double(), in_keys=[("vla_action", "hidden")])
    loss = AsymmetricClipPPOLoss(
        make_actor(table),
        critic,
        ratio_level="action",
        entropy_coeff=0.1,
        kl_coeff=0.1,
        reference_context=table.disable_adapter,
        clip_value=0.2,
        dual_clip=3.0,
    ).to("meta")
    data = data.to("meta")
    loss.set_normalizer(loss.count_valid(data))
    terms = loss(data)
    total(terms).backward()
    combine([terms, terms])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"clip_ratio_low": 1.5}, "clip_ratio_low=1.5"),
        ({"clip_ratio_high": 0.0}, "clip_ratio_high=0.0"),
        ({"ratio_level": "sequence"}, "ratio_level='sequence'.*'chunk'"),
        ({"dual_clip": 0.5}, "dual_clip=0.5"),
        ({"kl_coeff": -1.0}, "kl_coeff=-1.0"),
        ({"reconstruction_coeff": 0.1}, "bin_centers"),
    ],
)
def test_bad_arguments(kwargs, message):
    table, _ = make_batch()
    with pytest.raises(ValueError, match=message):
        AsymmetricClipPPOLoss(make_actor(table), **kwargs)


def test_bad_batches():
    table, data = make_batch()
    loss = AsymmetricClipPPOLoss(make_actor(table))
    with pytest.raises(ValueError, match="advantage has shape"):
        loss(data.clone().set("advantage", torch.ones(2)))
    with pytest.raises(KeyError, match="GRPOAdvantage"):
        loss(data.exclude("advantage"))
    with pytest.raises(ValueError, match="mask of shape"):
        loss(data.clone().set("mask", torch.ones(2, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="stored ones"):
        loss(data.clone().set(("vla_action", "log_probs"), torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="reference_context"):
        AsymmetricClipPPOLoss(make_actor(table), kl_coeff=0.1)(data)
    per_chunk = data.clone().set(("vla_action", "log_probs"), torch.zeros(2))
    with pytest.raises(ValueError, match="ratio_level='action'"):
        AsymmetricClipPPOLoss(make_actor(table, 2), ratio_level="action")(per_chunk)


def test_parameters_keep_their_names_and_modules_their_place():
    table, _ = make_batch()
    actor = make_actor(table)
    loss = AsymmetricClipPPOLoss(actor)
    assert loss.actor_network is actor
    assert [name for name, _ in loss.named_parameters()] == [
        "actor_network.module.0.module.logits",
        "actor_network.module.0.module.adapter",
    ]
