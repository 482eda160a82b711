"""Batches of at least so many control steps, in whole groups."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch import nn

from torchrl_vla.collectors import GroupCollector
from torchrl_vla.collectors.update_batches import UpdateCollector
from torchrl_vla.envs.toy import ToyTrackingEnv


class RandomActions(nn.Module):
    """Acts at random in the toy environment: chunks of 4 actions of 4 dimensions, or whatever its spec says."""

    def __init__(self, env: ToyTrackingEnv) -> None:
        super().__init__()
        self.shape = env.action_spec.shape[1:]

    def forward(self, tensordict):
        return tensordict.set("action", torch.rand(*tensordict.shape, *self.shape) * 2 - 1)


def make(min_steps: int) -> UpdateCollector:
    env = ToyTrackingEnv(3)
    return UpdateCollector(
        GroupCollector(env, RandomActions(env)), [0], range(50), min_steps=min_steps, group_size=4, horizon=24, seed=0
    )


def test_batches_are_whole_groups_of_enough_steps():
    collector = make(min_steps=200)
    for batch in itertools.islice(collector, 3):
        steps = int(batch["next", "num_control_steps"].sum())
        assert steps >= 200
        done = batch["next", "done"].squeeze(-1)
        _, episodes = batch["group_id"][done].unique(return_counts=True)
        assert episodes.tolist() == [4] * len(episodes)
        assert collector.mean_length == steps / int(done.sum())


def test_a_batch_is_not_kept_while_the_next_is_collected(monkeypatch: pytest.MonkeyPatch):
    collector = make(min_steps=20)  # one group each
    collect, given = collector.collector.collect, []

    def observed(plan):
        assert not any(action() is not None for action in given)
        part = collect(plan)
        given.append(weakref.ref(part["action"]))
        return part

    monkeypatch.setattr(collector.collector, "collect", observed)
    batches = iter(collector)
    for number in range(1, 4):
        batch = next(batches)
        assert len(given) == number and given[-1]() is not None
        del batch


def test_goes_on_with_the_group_after_the_last():
    def starts(batch):
        done = batch["next", "done"].squeeze(-1)
        return batch["init_state_id"][done].flatten()[::4].tolist()

    whole = make(min_steps=200)
    expected = [starts(batch) for batch in itertools.islice(whole, 4)]
    first = make(min_steps=200)
    seen = [starts(batch) for batch in itertools.islice(first, 2)]
    resumed = make(min_steps=200)
    resumed.load_state_dict(first.state_dict())
    seen += [starts(batch) for batch in itertools.islice(resumed, 2)]
    flat = list(itertools.chain(*expected))
    assert list(itertools.chain(*seen))[:6] == flat[:6]
    assert len(set(flat[:6])) == 6
