"""Actions of a chunk that were never executed count nowhere, whichever advantage or loss is used."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import ClipPPOLoss

from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage
from torchrl_vla.objectives.combining import combine
from torchrl_vla.objectives.masking import executed_actions, expand_mask

from .policy_table import make_actor, make_batch, random_batch, total, with_every_term

STEPS = torch.tensor([[2], [1]])


def test_by_hand():
    table, data = make_batch()
    data["next", "num_control_steps"] = STEPS
    loss = AsymmetricClipPPOLoss(make_actor(table))
    assert loss.valid_tokens(data).tolist() == [[[True, True], [True, True]], [[True, True], [False, False]]]
    assert loss.count_valid(data).to_dict() == {"ratios": 6, "tokens": 6, "decisions": 2}
    terms = loss(data)
    # tokens left: gains 1.28 .5 1.1 1.2 | -3 -1.6
    assert terms["loss_objective"].item() == pytest.approx(-(1.28 + 0.5 + 1.1 + 1.2 - 3 - 1.6) / 6)
    assert terms["clip_fraction"].item() == pytest.approx(4 / 6)
    assert terms["mean_ratio"].item() == pytest.approx((1.5 + 0.5 + 1.1 + 1.2 + 1.5 + 0.5) / 6)
    # the second chunk's ratio is .75, clipped to .8
    chunk = AsymmetricClipPPOLoss(make_actor(table), ratio_level="chunk")(data)
    assert chunk["loss_objective"].item() == pytest.approx(-(0.99 - 1.6) / 2)


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_they_count_in_no_term_and_have_no_gradient(level):
    """Every term is that of a mask that says the same, with garbage where nothing was executed; so are its parts."""
    table, data = random_batch()
    steps = torch.tensor([2, 1, 0, 2, 1, 2, 2, 1, 2]).unsqueeze(-1)
    masked = data.clone().set("mask", data["mask"] & executed_actions(steps, torch.Size([9, 2])))
    loss = with_every_term(table, level)
    loss.separate_losses = True  # the critic's gradient reaches the logits through the hidden state
    expected = loss(masked)
    total(expected).backward()
    gradient = table.logits.grad.clone()
    data["next", "num_control_steps"] = steps
    unexecuted = ~loss.valid_tokens(data)
    assert torch.equal(~unexecuted, expand_mask(masked["mask"], unexecuted.shape))
    data["vla_action", "log_probs"][unexecuted] = torch.nan
    data["vla_action", "chunk"][unexecuted] = torch.nan
    table.logits.grad = None
    terms = loss(data)
    total(terms).backward()
    torch.testing.assert_close(dict(terms.items()), dict(expected.items()))
    torch.testing.assert_close(table.logits.grad, gradient)
    assert (gradient[unexecuted] == 0).all()
    loss.set_normalizer(loss.count_valid(data))
    for key, value in combine([loss(part) for part in data.split(2)]).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6, msg=key, check_dtype=False)


def test_the_mask_they_make_can_be_stored_instead():
    table, data = random_batch()
    data["next", "num_control_steps"] = torch.tensor([2, 1, 0, 2, 1, 2, 2, 1, 2]).unsqueeze(-1)
    loss = with_every_term(table, "token")
    stored = data.exclude("next").set("mask", loss.valid_tokens(data))
    torch.testing.assert_close(dict(loss(stored).items()), dict(loss(data).items()))


def test_their_key_can_be_set_and_all_masks_hold_together():
    table, data = make_batch()
    data["steps"] = STEPS
    data["mask"] = torch.tensor([[True, False], [True, True]])
    data["collector", "mask"] = torch.tensor([[True], [True]])
    loss = AsymmetricClipPPOLoss(make_actor(table))
    assert loss.valid_tokens(data).sum((-1, -2)).tolist() == [2, 4]
    loss.set_keys(num_control_steps="steps")
    assert loss.valid_tokens(data).sum((-1, -2)).tolist() == [2, 2]
    data["collector", "mask"][1] = False
    assert loss.valid_tokens(data).sum((-1, -2)).tolist() == [2, 0]


def test_a_decision_s_one_log_probability_counts_if_any_action_ran():
    assert executed_actions(torch.tensor([[2], [0], [1]]), torch.Size([3])).tolist() == [True, False, True]
    assert expand_mask(torch.tensor([[True, False], [False, False]]), torch.Size([2])).tolist() == [True, False]


# -- GRPOAdvantage ----------------------------------------------------------------------------------------------------


def two_episodes(**entries: Tensor) -> tuple[torch.nn.Module, TensorDict]:
    """Three decisions of two episodes of one group: the first succeeds after 1 of the 2 actions of its last chunk."""
    ratios = torch.tensor([[[1.5, 0.5], [1.1, 1.2]], [[1.1, 0.9], [9.0, 9.0]], [[1.5, 0.5], [0.9, 1.0]]])
    table, data = make_batch(ratios, torch.zeros(3, 1))
    done = torch.tensor([[False], [True], [True]])
    success = torch.tensor([[False], [True], [False]])
    data["next"] = {"done": done, "success": success, "reward": success.float()}
    data["next", "num_control_steps"] = torch.tensor([[2], [1], [2]])
    data["group_id"] = torch.zeros(3, 1, dtype=torch.int64)
    return table, data.update(entries)


def test_the_advantage_writes_the_mask_and_the_tokens_of_each_trajectory():
    _, data = two_episodes()
    out = GRPOAdvantage("dr_grpo").inv(data)
    assert out["mask"].tolist() == [[True, True], [True, False], [True, True]]
    assert out["trajectory_tokens"].flatten().tolist() == [6, 6, 4]
    assert "mask" not in data.keys()
    only_action = data.clone().set("action", torch.zeros(3, 2, 7)).exclude("vla_action")
    assert GRPOAdvantage().inv(only_action)["mask"].tolist() == out["mask"].tolist()
    assert "mask" not in GRPOAdvantage().inv(data.exclude(("next", "num_control_steps"))).keys()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.tensor([True, True, False]), [[True, True], [True, False], [False, False]]),
        (torch.tensor([[True], [True], [False]]), [[True, True], [True, False], [False, False]]),
        (torch.tensor([[False, True]] * 3), [[False, True], [False, False], [False, True]]),
        (torch.ones(3, 2, 2, dtype=torch.bool), [[[True] * 2] * 2, [[True] * 2, [False] * 2], [[True] * 2] * 2]),
    ],
)
def test_the_advantage_narrows_a_mask_that_is_there(mask, expected):
    out = GRPOAdvantage("dr_grpo").inv(two_episodes(mask=mask)[1])
    assert out["mask"].tolist() == expected
    lost = [2, 2, 1] if mask.ndim < 3 and mask.shape[-1] != 2 else None
    if lost:
        assert out["trajectory_tokens"].flatten().tolist() == [6, 6, 0]


def test_a_stock_loss_reads_the_mask_that_the_advantage_wrote():
    """Advantages 1/2 and -1/2; the never executed ratio of 9 does not count."""
    table, data = two_episodes()
    scored = GRPOAdvantage("dr_grpo").inv(data)
    stock = ClipPPOLoss(make_actor(table), clip_epsilon=(0.2, 0.28), entropy_bonus=False, functional=False)
    stock.set_keys(sample_log_prob=("vla_action", "log_probs"), action=("vla_action", "tokens"))
    stock.loss_mask_key = "mask"
    gains = [1.28, 0.5, 1.1, 1.2, 1.1, 0.9, -1.5, -0.8, -0.9, -1.0]
    expected = pytest.approx(-sum(gains) / 2 / len(gains))
    assert stock(scored)["loss_objective"].item() == expected
    ours = AsymmetricClipPPOLoss(make_actor(table))
    assert ours(scored)["loss_objective"].item() == expected
    assert ours(scored.exclude("mask"))["loss_objective"].item() == expected
    assert ours(scored.exclude("next"))["loss_objective"].item() == expected


def test_a_loss_of_whole_decisions_takes_the_mask_too():
    table, data = two_episodes()
    data["vla_action", "log_probs"] = data["vla_action", "log_probs"].sum((-1, -2))
    scored = GRPOAdvantage("dr_grpo").inv(data)
    assert scored["trajectory_tokens"].flatten().tolist() == [2, 2, 1]
    terms = AsymmetricClipPPOLoss(make_actor(table, 2), ratio_level="chunk")(scored)
    assert terms["num_ratios"].item() == 3
    # The second decision's ratio holds the actions that never ran: 1.1 * .9 * 81, clipped to 1.28.
    assert terms["loss_objective"].item() == pytest.approx(-(0.99 + 1.28 - 0.8) / 2 / 3)
