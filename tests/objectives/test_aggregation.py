"""Averages per token and per trajectory, by hand, in micro-batches and over processes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage
from torchrl_vla.objectives.combining import combine

from .policy_table import make_actor, make_batch, random_batch, total, with_every_term

# Three decisions of two trajectories; 1 of 2 actions of the second decision is executed: 6 and 4 tokens.
RATIOS = torch.tensor([[[1.5, 0.5], [1.1, 1.2]], [[1.1, 0.9], [9.0, 9.0]], [[1.5, 0.5], [0.9, 1.0]]])
GAINS = [1.28, 0.5, 1.1, 1.2, 1.1, 0.9], [-3.0, -1.6, -1.8, -2.0]


def make_trajectories() -> tuple[torch.nn.Module, TensorDict]:
    table, data = make_batch(RATIOS, torch.tensor([[1.0], [1.0], [-2.0]]))
    data["next", "num_control_steps"] = torch.tensor([[2], [1], [2]])
    data["trajectory_tokens"] = torch.tensor([[6], [6], [4]])
    return table, data


def make_loss(table, **options) -> AsymmetricClipPPOLoss:
    return AsymmetricClipPPOLoss(make_actor(table), aggregation="trajectory", **options)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_by_hand():
    table, data = make_trajectories()
    per_token = AsymmetricClipPPOLoss(make_actor(table))(data)
    assert per_token["loss_objective"].item() == pytest.approx(-mean(GAINS[0] + GAINS[1]))
    loss = make_loss(table)
    per_trajectory = loss(data)
    assert per_trajectory["loss_objective"].item() == pytest.approx(-(mean(GAINS[0]) + mean(GAINS[1])) / 2)
    assert loss.count_valid(data)["trajectories"].item() == pytest.approx(2)
    assert loss.count_valid(data[:1])["trajectories"].item() == pytest.approx(4 / 6)
    for name in ("clip_fraction", "mean_ratio", "ESS", "kl_approx", "entropy"):  # diagnostics are plain means
        assert per_trajectory[name] == per_token[name]


@pytest.mark.parametrize(
    ("level", "gains"),
    [
        # Each ratio weighs its tokens: actions .75 1.28 .99 and -1.6 -1.8, chunks .99 (4 tokens) .99 (2) and -1.6.
        ("action", ((0.75 + 1.28 + 0.99) / 3, (-1.6 - 1.8) / 2)),
        ("chunk", ((4 * 0.99 + 2 * 0.99) / 6, -1.6)),
    ],
)
def test_ratios_of_several_tokens_by_hand(level, gains):
    table, data = make_trajectories()
    assert make_loss(table, ratio_level=level)(data)["loss_objective"].item() == pytest.approx(-sum(gains) / 2)


def test_every_loss_of_the_policy_is_averaged_like_this_by_hand():
    """Squared errors 1 in the first trajectory and 4 in the second, k3 of the token's log-ratios 0 and log 2."""
    table, data = make_trajectories()
    data["vla_action", "chunk"] = torch.tensor([1.0, 1.0, 2.0]).reshape(3, 1, 1).expand(3, 2, 2)
    reference = torch.tensor([0.5, 0.5, 1.0]).reshape(3, 1, 1).expand(3, 2, 2).log()
    data["vla_action", "reference_log_probs"] = reference
    loss = make_loss(table, reconstruction_coeff=1.0, bin_centers=torch.tensor([-1.0, 1.0]), kl_coeff=1.0)
    terms = loss(data)
    k3 = 2 - torch.tensor(2.0).log().item() - 1
    assert terms["loss_reconstruction"].item() == pytest.approx((1 + 4) / 2)
    assert terms["loss_kl"].item() == pytest.approx(k3 / 2)
    assert terms["kl_reference"].item() == pytest.approx(k3 * 4 / 10)


def grouped(size: int = 9) -> tuple[torch.nn.Module, TensorDict]:
    """Episodes of 2, 3 and 4 decisions, scored by GRPOAdvantage."""
    table, data = random_batch(size)
    data = data.exclude("mask", "advantage")
    done = torch.zeros(size, 1, dtype=torch.bool)
    done[[1, 4, 8]] = True
    success = done.clone()
    success[8] = False
    data["next"] = {"done": done, "success": success, "reward": success.double()}
    data["next", "num_control_steps"] = torch.where(done, 1, 2)
    data["group_id"] = torch.zeros(size, 1, dtype=torch.int64)
    return table, GRPOAdvantage().inv(data)


def test_what_the_advantage_writes_makes_trajectories_weigh_the_same():
    table, data = grouped()
    loss = make_loss(table)
    assert loss.count_valid(data)["trajectories"].item() == pytest.approx(3)
    alone = [loss(part)["loss_objective"] for part in data.split([2, 3, 4])]
    torch.testing.assert_close(loss(data)["loss_objective"], torch.stack(alone).mean())


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_add_up(level, micro_batch):
    table, data = grouped()
    loss = with_every_term(table, level)
    loss.aggregation = "trajectory"

    def gradient(micro_batch: int) -> Tensor:
        loss.zero_grad()
        for part in data.split(micro_batch):
            total(loss(part)).backward()
        return torch.cat([p.grad.flatten() for p in loss.parameters()])

    expected, whole = gradient(len(data)), loss(data)
    loss.set_normalizer(loss.count_valid(data))
    torch.testing.assert_close(gradient(micro_batch), expected, atol=1e-6, rtol=0)
    combined = combine([loss(part) for part in data.split(micro_batch)])
    assert set(combined) == set(whole.keys())
    for key, value in combined.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-6, msg=key, check_dtype=False)


@pytest.mark.parametrize("aggregation", ["token", "trajectory"])
def test_averages_of_processes_add_up(aggregation):
    """Shares of 1, 0 and 8 decisions; gradients are averaged, so the counts are the sums over the processes' number."""
    table, data = grouped()
    loss = AsymmetricClipPPOLoss(make_actor(table), aggregation=aggregation)

    def averaged(shares: list[TensorDict]) -> Tensor:
        loss.set_normalizer(sum(loss.count_valid(share) for share in shares) / len(shares))
        parts = [loss(share)["loss_objective"] for share in shares if len(share)]
        return torch.stack(parts).sum() / len(shares)

    for batch, shares in (
        (data, [data[:1], data[:0], data[1:]]),
        (data[:1], [data[:1]] + [data[:0]] * 19),  # less than one token per process
    ):
        torch.testing.assert_close(averaged(shares), loss_of(loss, batch))


def loss_of(loss: AsymmetricClipPPOLoss, batch: TensorDict) -> Tensor:
    loss.set_normalizer(None)
    return loss(batch)["loss_objective"]


def test_what_it_needs_is_said():
    table, data = make_trajectories()
    with pytest.raises(KeyError, match="trajectory_tokens.*GRPOAdvantage"):
        make_loss(table)(data.exclude("trajectory_tokens"))
    with pytest.raises(ValueError, match=r"aggregation='episode' is unknown: choose one of \('token', 'trajectory'\)"):
        AsymmetricClipPPOLoss(make_actor(table), aggregation="episode")
    loss = make_loss(table)
    loss.set_keys(trajectory_tokens="length")
    assert loss(data.rename_key_("trajectory_tokens", "length"))["num_ratios"] == 10
