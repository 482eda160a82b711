"""Our form of ToyVLAEnv is the stock one, and its judge tells who reads the target."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import ToyVLAEnv, TransformedEnv, check_env_specs
from torchrl.envs.transforms import MultiAction

from torchrl_vla.envs.toy import ToyTrackingEnv, greedy_success_rate


def test_the_judge():
    """An oracle always succeeds; one that follows another row's target succeeds by its overlap, a constant less."""

    def policy(show_target: bool):
        def act(tensordict: TensorDictBase) -> TensorDictBase:
            target = tensordict["observation", "state"][..., 2:] * show_target
            return tensordict.set("action", target.unsqueeze(-2).expand(*target.shape[:-1], 4, 2))

        return act

    # P(|u| < t for the difference of two uniforms on [-1/2, 1/2]) = 1 - (1 - t)^2, P(|u| < t) = 2 t, in two dimensions
    judge = partial(greedy_success_rate, success_tol=0.35, episodes=512)
    assert judge(policy(True)) == 1.0
    assert judge(policy(True), shuffled=True) == pytest.approx((1 - 0.65**2) ** 2, abs=0.08)
    assert judge(policy(False)) == judge(policy(False), shuffled=True) == pytest.approx(0.7**2, abs=0.08)


def test_it_is_the_stock_env():
    """Same targets and actions: the same successes after the same decisions."""
    slots, decisions = 64, 6
    torch.manual_seed(0)
    ours = ToyTrackingEnv(slots)
    shown = ours.reset()
    base = ToyVLAEnv(
        action_dim=2, state_dim=4, success_steps=2, success_tol=0.35, batch_size=torch.Size([slots]), seed=0
    )
    stock = TransformedEnv(base, MultiAction(stack_rewards=False))
    other = stock.reset()
    base._target = shown["observation", "state"][:, 2:].clone()
    running = torch.ones(slots, dtype=torch.bool)
    successes = 0
    for decision in range(decisions):
        action = 1.2 * torch.rand(slots, 4, 2) - 0.6
        shown = ours.step(shown.set("action", action).set("_step", running))["next"]
        other = stock.step(other.set("action", action).set("_step", running))["next"]
        assert torch.equal(shown["success"][running], other["success"][running])
        assert torch.equal(shown["success"], shown["terminated"]) or decision
        last = shown["done"].squeeze(-1) & running
        assert torch.equal(shown["truncated"].squeeze(-1)[last], ~shown["success"].squeeze(-1)[last])
        successes += int(shown["success"].squeeze(-1)[running].sum())
        running = running & ~shown["done"].squeeze(-1)
    assert not running.any() and 5 < successes < slots - 5


def test_targets_follow_the_initial_state():
    env = ToyTrackingEnv(3)
    ids = torch.tensor([[4], [9], [4]])
    first = env.reset(TensorDict({"init_state_id": ids}, [3]))
    again = ToyTrackingEnv(3).reset(TensorDict({"init_state_id": ids.flip(0)}, [3]))
    assert torch.equal(first["init_state_id"], ids)
    assert torch.equal(first["observation", "state"], again["observation", "state"].flip(0))
    assert torch.equal(*first["observation", "state"][[0, 2]]) and not torch.equal(*first["observation", "state"][:2])
    assert first["observation", "state"][:, 2:].abs().max() <= 0.5


@pytest.mark.parametrize("num_envs", [None, 3])
def test_specs(num_envs):
    check_env_specs(ToyTrackingEnv(num_envs))


def test_bad_arguments():
    with pytest.raises(ValueError, match="chunk_size=0"):
        ToyTrackingEnv(chunk_size=0)
    with pytest.raises(ValueError, match="one task, 0"):
        ToyTrackingEnv(2).reset(TensorDict({"task_id": torch.tensor([[0], [1]])}, [2]))
