"""A batch as TorchRL's value estimators read it, and which of its actions were executed."""

from __future__ import annotations

import pytest
import torch
from stubborn_env import Policy, StubbornEnv
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.objectives.value import GAE

from torchrl_vla.collectors import EpisodePlan, GroupCollector
from torchrl_vla.envs.toy import ToyTrackingEnv

GAMMA, LMBDA = 0.9, 0.8
#: Of the episodes: cut after four decisions, success after one, cut, cut, success.
PLAN = EpisodePlan([(0, 1), (0, 0), (0, 3), (0, 5), (0, 2)])
LENGTHS = [4, 1, 4, 4, 1]
REWARDS = [[0, 0, 0, 0], [1], [0, 0, 0, 0], [0, 0, 0, 0], [1]]


def value_of(time: torch.Tensor) -> torch.Tensor:
    return 10.0 + 3.0 * time.float()


class Valued(Policy):
    """Has a critic: the value of a state is 10 + 3 t."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        super().forward(tensordict)
        return tensordict.set("state_value", value_of(tensordict["time"]))


def advantages_by_hand(bootstrap: bool) -> list[float]:
    """GAE's recursion, from the end of each episode to its start."""
    advantages = []
    for rewards in REWARDS:
        truncated = len(rewards) == 4
        after, backwards = 0.0, []
        for time in reversed(range(len(rewards))):
            last = time == len(rewards) - 1
            following = 10.0 + 3.0 * (time + 1) if not last or (truncated and bootstrap) else 0.0
            delta = rewards[time] + GAMMA * following - (10.0 + 3.0 * time)
            after = delta + (0.0 if last else GAMMA * LMBDA * after)
            backwards.append(after)
        advantages += reversed(backwards)
    return advantages


@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_with_the_rollouts_values(bootstrap):
    batch = GroupCollector(StubbornEnv(2), Valued(), bootstrap_at_horizon=bootstrap).collect(PLAN)
    following = [13.0, 16.0, 19.0, 22.0 if bootstrap else 0.0]
    assert batch["next", "state_value"].flatten().tolist() == [*following, 0.0, *following, *following, 0.0]
    ends = batch["next", "done"]
    succeeded = ends & (batch["next", "reward"] == 1)
    assert batch["next", "truncated"].equal(ends & ~succeeded)
    assert batch["next", "terminated"].equal(succeeded if bootstrap else ends)
    GAE(gamma=GAMMA, lmbda=LMBDA, value_network=None)(batch)
    assert batch["advantage"].shape == (sum(LENGTHS), 1)
    assert batch["advantage"].flatten().tolist() == pytest.approx(advantages_by_hand(bootstrap), abs=1e-4)
    target = batch["advantage"] + batch["state_value"]
    torch.testing.assert_close(batch["value_target"], target)


CRITIC = TensorDictModule(value_of, in_keys=["time"], out_keys=["state_value"])


def test_gae_with_a_network_needs_no_next_observation():
    """Every episode ends as a terminal state, so that `shifted` values are all that is needed."""
    batch = GroupCollector(StubbornEnv(2), Policy()).collect(PLAN)
    assert ("next", "time") not in batch.keys(True)
    GAE(gamma=GAMMA, lmbda=LMBDA, value_network=CRITIC, shifted=True)(batch)
    assert batch["shifted_valid"].all()
    assert batch["advantage"].flatten().tolist() == pytest.approx(advantages_by_hand(False), abs=1e-4)


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_gae_with_a_network_and_next_observations(bootstrap, shifted):
    collector = GroupCollector(StubbornEnv(2), Policy(), next_keys=["time"], bootstrap_at_horizon=bootstrap)
    batch = collector.collect(PLAN)
    GAE(gamma=GAMMA, lmbda=LMBDA, value_network=CRITIC, shifted=shifted, shifted_budget=4)(batch)
    assert batch["advantage"].flatten().tolist() == pytest.approx(advantages_by_hand(bootstrap), abs=1e-4)


def test_the_policy_does_not_see_the_end_of_a_time_out_unless_it_is_valued():
    for bootstrap, forwards in ((False, 4), (True, 5)):
        policy = Valued()
        GroupCollector(StubbornEnv(2), policy, bootstrap_at_horizon=bootstrap).collect(EpisodePlan([(0, 1), (0, 3)]))
        assert len(policy.batches) == forwards


@pytest.mark.parametrize("slots", [1, 3])
def test_actions_that_were_not_executed_are_masked(slots):
    """The target is met from the second action on, twice in a row: three of four actions are executed."""

    def act(tensordict: TensorDictBase) -> TensorDictBase:
        chunk = tensordict["observation", "state"][..., 2:].unsqueeze(-2).repeat_interleave(4, -2)
        chunk[..., 0, :] += 1.0
        odd = tensordict["init_state_id"] % 2 == 1
        return tensordict.set("action", torch.where(odd.unsqueeze(-1), chunk, 1.0))

    batch = GroupCollector(ToyTrackingEnv(slots, max_decisions=2), act).collect(EpisodePlan([(0, 1), (0, 2), (0, 3)]))
    run, part = [True] * 4, [True, True, True, False]
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].tolist() == [part, run, run, part]
    assert batch["mask"].sum(-1, keepdim=True).equal(batch["next", "num_control_steps"])


def test_a_mask_of_single_actions_and_none_without_counted_steps():
    class Single(StubbornEnv):
        def __init__(self, num_envs: int) -> None:
            super().__init__(num_envs)
            self.observation_spec["num_control_steps"] = self.observation_spec["time"].clone()

        def _observe(self, success: torch.Tensor) -> TensorDictBase:
            return super()._observe(success).set("num_control_steps", (self.time > 0).long())

    batch = GroupCollector(Single(2), Policy()).collect(PLAN)
    assert batch["mask"].shape == (sum(LENGTHS), 1) and batch["mask"].all()
    assert "mask" not in GroupCollector(StubbornEnv(2), Policy()).collect(PLAN).keys()
