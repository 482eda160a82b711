"""GRPOAdvantage against advantages worked out by hand, and against TorchRL's MCAdvantage where both apply."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives.llm import MCAdvantage

from torchrl_vla.objectives import GRPOAdvantage


def episode(group: int, rewards: list[float]) -> TensorDict:
    length = len(rewards)
    reward = torch.tensor(rewards).unsqueeze(-1)
    ends = torch.zeros(length, 1, dtype=torch.bool)
    ends[-1] = True
    ids = {"task_id": torch.full((length, 1), group // 10), "init_state_id": torch.full((length, 1), group % 10)}
    return TensorDict({**ids, "next": {"reward": reward, "done": ends, "success": reward > 0}}, [length])


def batch(*episodes: TensorDict) -> TensorDict:
    return torch.cat(episodes)


# Group 12: returns 1, 0, 0 after 2, 3, 1 decisions: mean 1/3, unbiased std sqrt(1/3).
MIXED = [episode(12, [0, 1.0]), episode(12, [0, 0, 0.0]), episode(12, [0.0])]


def test_advantages_by_hand():
    out = GRPOAdvantage().inv(batch(*MIXED))
    std = math.sqrt(1 / 3)
    assert out["advantage"].shape == (6, 1) and out["advantage"].dtype == torch.float32
    expected = [(2 / 3) / std] * 2 + [(-1 / 3) / std] * 4
    assert out["advantage"].flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert out["episode_return"].flatten().tolist() == [1, 1, 0, 0, 0, 0]


def test_the_epsilon_is_added_to_the_unbiased_std():
    small = [episode(1, [1e-6]), episode(1, [0.0])]
    out = GRPOAdvantage(keep_low=0).inv(batch(*small))
    std = 1e-6 / math.sqrt(2)
    assert out["advantage"].flatten().tolist() == pytest.approx([5e-7 / (std + 1e-6), -5e-7 / (std + 1e-6)], rel=1e-4)


@pytest.mark.parametrize(("estimator", "expected"), [("rloo", [1, -0.5, -0.5]), ("dr_grpo", [2 / 3, -1 / 3, -1 / 3])])
def test_variants_by_hand(estimator, expected):
    out = GRPOAdvantage(estimator).inv(batch(*MIXED))
    assert out["advantage"].flatten()[[0, 2, 5]].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("estimator", "scale", "expected"),
    [
        ("dr_grpo", 1.0, [2 / 3, 1 / 2, -1 / 3, -1 / 2, -1 / 3, -1 / 3]),
        ("grpo", math.sqrt(1 / 3), [2 / 3, 1 / 2, -1 / 3, -1 / 2, -1 / 3, -1 / 3]),
        ("rloo", 1.0, [1, 1, -1 / 2, -1, -1 / 2, -1 / 2]),
    ],
)
def test_those_that_still_run_by_hand(estimator, scale, expected):
    """Three run at the first decision, the first two at the second; alone at the third, one meets the whole group."""
    transform = GRPOAdvantage(estimator, baseline="running")
    out = transform.inv(batch(*MIXED, episode(13, [0.0]), episode(13, [0.0])))
    assert (out["advantage"].flatten() * scale).tolist() == pytest.approx(expected, rel=1e-5)
    stats = transform.get_stats()
    assert (stats["kept_episodes"], stats["kept_decisions"], stats["decisions"]) == (3, 6, 8)


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("baseline", ["group", "running"])
def test_the_gradient_s_expectation_by_enumeration(baseline, members):
    """Action 0 of either decision succeeds at once, action 1 goes on, and fails after the second."""
    p, q = torch.tensor([0.3, 0.4]).double()  # of action 0
    # One episode each: its probability, its reward, and d(log-probability)/d(p, q) of its decisions.
    ways = [
        (p, 1.0, [[1 / p, 0]]),
        ((1 - p) * q, 1.0, [[-1 / (1 - p), 0], [0, 1 / q]]),
        ((1 - p) * (1 - q), 0.0, [[-1 / (1 - p), 0], [0, -1 / (1 - q)]]),
    ]
    transform = GRPOAdvantage("rloo", baseline=baseline)
    expectation = torch.zeros(2).double()
    for group in itertools.product(ways, repeat=members):
        data = batch(*(episode(1, [0.0] * (len(scores) - 1) + [reward]) for _, reward, scores in group))
        data["scores"] = torch.tensor([row for _, _, scores in group for row in scores]).double()
        out = transform.inv(data)
        if out is not None:
            estimate = (out["advantage"] * out["scores"]).sum(0) / members
            expectation += math.prod(probability for probability, _, _ in group) * estimate
    # d(p + (1 - p) q)
    assert expectation.tolist() == pytest.approx([0.6, 0.7], abs=1e-6)


def test_those_that_still_run_leave_the_gradient_as_it_is_and_make_it_less_noisy():
    """An action of 1 succeeds at once with 0.7; else three idle actions follow, and success with 0.1."""
    torch.manual_seed(0)
    groups, members, p = 20_000, 4, 0.5
    first = torch.rand(groups * members) < p
    at_once = first & (torch.rand(len(first)) < 0.7)
    success = at_once | (torch.rand(len(first)) < 0.1)
    lengths = torch.where(at_once, 1, 4)
    ends = lengths.cumsum(0) - 1
    action = (torch.rand(int(lengths.sum())) < p).double()
    action[ends - lengths + 1] = first.double()
    done = torch.zeros(len(action), 1, dtype=torch.bool)
    done[ends] = True
    succeeded = torch.zeros_like(done)
    succeeded[ends, 0] = success
    group = (torch.arange(len(first)) // members).repeat_interleave(lengths).unsqueeze(-1)
    after = TensorDict({"done": done, "success": succeeded, "reward": succeeded.float()}, [len(action)])
    data = TensorDict({"group_id": group, "score": action - p, "next": after}, [len(action)])
    spread = {}
    for baseline in ("group", "running"):
        out = GRPOAdvantage("rloo", baseline=baseline, keep_low=0, keep_high=1).inv(data)
        terms = out["advantage"].squeeze(-1) * out["score"] / members
        estimates = torch.zeros(groups, dtype=torch.double).index_add_(0, out["group_id"].squeeze(-1), terms)
        spread[baseline] = estimates.std().item()
        gradient = p * (1 - p) * (0.7 + 0.3 * 0.1 - 0.1)
        assert estimates.mean().item() == pytest.approx(gradient, abs=4 * spread[baseline] / math.sqrt(groups))
    assert spread["running"] < 0.9 * spread["group"]


def test_the_discount_counts_decisions_from_the_first():
    out = GRPOAdvantage("dr_grpo", verifier_gamma=0.5).inv(batch(*MIXED, episode(12, [1.0])))
    # returns .5 0 0 1
    assert out["episode_return"].flatten().tolist() == [0.5, 0.5, 0, 0, 0, 0, 1]
    assert out["advantage"].flatten()[[0, 2, 6]].tolist() == pytest.approx([0.125, -0.375, 0.625])


def test_interleaved_groups_are_told_apart():
    other = [episode(21, [1.0]), episode(21, [0, 0.0]), episode(21, [1.0]), episode(21, [1.0])]
    data = batch(other[0], MIXED[0], other[1], MIXED[1], other[2], MIXED[2], other[3])
    out = GRPOAdvantage("dr_grpo").inv(data)
    expected = {12: {1: 2 / 3, 0: -1 / 3}, 21: {1: 0.25, 0: -0.75}}
    groups = (out["task_id"] * 10 + out["init_state_id"]).flatten().tolist()
    for group, value, advantage in zip(
        groups, out["episode_return"].flatten().tolist(), out["advantage"].flatten().tolist(), strict=True
    ):
        assert advantage == pytest.approx(expected[group][int(value)])


def test_the_same_state_in_two_groups_needs_group_id():
    twice = batch(episode(3, [1.0]), episode(3, [0.0]), episode(3, [1.0]), episode(3, [1.0]))
    twice["group_id"] = torch.tensor([[0], [0], [1], [1]])
    transform = GRPOAdvantage()
    assert transform.inv(twice).numel() == 2
    assert transform.get_stats()["dropped_all_succeeded"] == 1
    by_state = GRPOAdvantage(group_keys=("task_id", "init_state_id")).inv(twice)
    assert by_state.numel() == 4


def test_dropped_groups_and_why():
    failed = [episode(1, [0.0]), episode(1, [0, 0.0])]
    succeeded = [episode(2, [1.0]), episode(2, [0, 1.0])]
    rare = [episode(3, [0.0]) for _ in range(19)] + [episode(3, [1.0])]  # 0.05
    at_the_bound = [episode(4, [0.0]) for _ in range(9)] + [episode(4, [1.0])]  # 0.1 is kept
    alone = [episode(5, [1.0])]
    transform = GRPOAdvantage(keep_low=0.1, keep_high=0.9)
    out = transform.inv(batch(*failed, *succeeded, *rare, *at_the_bound, *alone))
    assert set(out["init_state_id"].flatten().tolist()) == {4}
    assert transform.get_stats() == {
        "episodes": 35,
        "decisions": 37,
        "groups": 5,
        "kept": 1,
        "kept_episodes": 10,
        "kept_decisions": 10,
        "dropped_all_failed": 1,
        "dropped_all_succeeded": 1,
        "dropped_out_of_bounds": 1,
        "dropped_incomplete": 1,
        "success_rate": pytest.approx(5 / 35),
        "mean_return": pytest.approx(5 / 35),
        "advantage_mean": pytest.approx(0, abs=1e-12),
        # Nine deviate by 0.1, one by 0.9, from a mean of 0.1; the unbiased variance is 0.1.
        "advantage_std": pytest.approx(math.sqrt((9 * 0.1**2 + 0.9**2) / 10 / 0.1), rel=1e-5),
        "advantage_nonzero": 1.0,
    }
    transform.reset_stats()
    assert not any(transform.get_stats().values())


def test_advantage_figures_add_up_over_batches():
    transform = GRPOAdvantage("dr_grpo")
    transform.inv(batch(*MIXED))  # 2/3 twice, -1/3 four times
    transform.inv(batch(episode(1, [0.5]), episode(1, [0.5, 0.0]), episode(1, [1.0, 0.0]), episode(1, [0.0, 0.0])))
    values = [2 / 3] * 2 + [-1 / 3] * 4 + [0, 0, 0, 1 / 2, 1 / 2, -1 / 2, -1 / 2]
    mean = sum(values) / len(values)
    stats = transform.get_stats()
    assert stats["kept_decisions"] == len(values)
    assert stats["advantage_mean"] == pytest.approx(mean)
    assert stats["advantage_std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)))
    assert stats["advantage_nonzero"] == pytest.approx(10 / 13)


@pytest.mark.parametrize("size", [8, 11, 19, 40])
@pytest.mark.parametrize("successes", [1, -1])
def test_any_group_with_both_outcomes_is_kept(size, successes):
    rewards = [float(i < successes % size) for i in range(size)]
    out = GRPOAdvantage().inv(batch(*(episode(3, [reward]) for reward in rewards)))
    assert out.numel() == size


def test_without_bounds_a_group_goes_only_if_its_advantages_are_all_zero():
    succeeded = [episode(2, [1.0]), episode(2, [0, 1.0])]
    assert GRPOAdvantage().inv(batch(*succeeded)) is None
    discounted = GRPOAdvantage("dr_grpo", verifier_gamma=0.5).inv(batch(*succeeded))
    assert discounted["advantage"].flatten().tolist() == pytest.approx([0.25, -0.25, -0.25])
    rare = [episode(3, [0.0]) for _ in range(19)] + [episode(3, [1.0])]
    assert GRPOAdvantage(keep_low=0.1).inv(batch(*rare)) is None


def test_an_unknown_baseline_is_named():
    with pytest.raises(ValueError, match="baseline='mean' is unknown.*group.*running"):
        GRPOAdvantage(baseline="mean")


def test_min_group_size():
    assert GRPOAdvantage(min_group_size=4).inv(batch(*MIXED)) is None
    assert GRPOAdvantage(min_group_size=3).inv(batch(*MIXED)).numel() == 6


def test_agrees_with_mc_advantage():
    generator = torch.Generator().manual_seed(0)
    episodes = []
    for group in range(8):
        for _ in range(4):
            length = int(torch.randint(1, 5, (), generator=generator))
            success = float(torch.rand((), generator=generator) > 0.7)
            episodes.append(episode(group, [0.0] * (length - 1) + [success]))
    data = batch(*episodes)
    stock = MCAdvantage(4, prompt_key="init_state_id", trajectory_return="sum", keep_return_bounds=(0.1, 0.9))
    expected = stock.inv(data)
    ours = GRPOAdvantage().inv(data)
    assert 0 < len(expected) < len(data)
    torch.testing.assert_close(ours["init_state_id"], expected["init_state_id"])
    torch.testing.assert_close(ours["advantage"], expected["advantage"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (["ppo"], {}, "estimator='ppo'.*'rloo'"),
        ([], {"verifier_gamma": 0.0}, "verifier_gamma=0.0"),
        ([], {"keep_low": 0.9, "keep_high": 0.1}, "keep_low=0.9"),
        ([], {"min_group_size": 1}, "min_group_size=1"),
    ],
)
def test_bad_arguments(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        GRPOAdvantage(*args, **kwargs)


def test_bad_data():
    with pytest.raises(KeyError, match="init_state_id"):
        GRPOAdvantage().inv(batch(*MIXED).exclude("init_state_id"))
    with pytest.raises(KeyError, match="action_key='nothing'"):
        GRPOAdvantage(action_key="nothing").inv(batch(*MIXED))
