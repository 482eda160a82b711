"""An episode owns its random numbers: the same ones on any slot, worker or rank, alone or beside others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.envs import EnvBase, SerialEnv

from torchrl_vla.collectors import Episode, EpisodePlan, GroupCollector
from torchrl_vla.collectors.seeds import decision_seeds, episode_seeds
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.actor import LOGITS_KEY, ActionTokenSampler, OpenVLAActor

CHUNK_SIZE, DIMS = 2, 7
TOKENS, STATE = ("vla_action", "tokens"), ("observation", "state")
PLAN = EpisodePlan([(0, 1), (0, 2), (0, 3)], group_size=3)
SETTING = {"chunk_size": CHUNK_SIZE, "action_dim": DIMS, "max_decisions": 3, "success_tol": 0.5}


class ArmEnv(ToyTrackingEnv):
    """Every gripper command is right, for it is all or nothing and targets lie in between."""

    decisions = 0

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.decisions += int(tensordict.get("_step", torch.ones(max(1, tensordict.numel()))).sum())
        action = tensordict["action"].clone()
        action[..., -1] = self._target[..., -1:]
        return super()._step(tensordict.clone(False).set("action", action))


make_env = partial(ArmEnv, **SETTING)
VALUES = ActionTokenizer().decode(torch.arange(256))  # the action of each token


def logits(state: Tensor) -> Tensor:
    """Near the target, and of the row alone to the bit: no matrix product, whose rounding may depend on the batch."""
    near = -4 * (VALUES - state[..., DIMS:].unsqueeze(-1)).square()
    return near.unsqueeze(-3).repeat_interleave(CHUNK_SIZE, -3)


def make_policy() -> OpenVLAActor:
    return OpenVLAActor(
        TensorDictModule(logits, in_keys=[STATE], out_keys=[LOGITS_KEY]),
        ActionTokenSampler(ActionTokenizer(), chunk_size=CHUNK_SIZE, temperature=1.0, log_prob_level="token"),
    )


def collect(env: EnvBase | list[EnvBase], plan=PLAN, *, seed: int = 5, number: int = 0) -> TensorDict:
    torch.seed()  # the global generator has no part in it
    batch = GroupCollector(env, make_policy(), seed=seed).collect(plan, number=number)
    return batch.exclude(("observation", "image"))  # the environment draws it


def assert_same(one: TensorDictBase, other: TensorDictBase) -> None:
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    for key, value in one.items(True, True):
        assert torch.equal(value, other[key]), key


def test_an_episode_does_not_depend_on_slots():
    alone = collect(make_env())
    ends = alone["next", "done"].squeeze(-1)
    assert 0 < alone["next", "success"].sum() < ends.sum()  # successes and failures, so slots change hands
    tokens = alone[TOKENS][torch.cat([torch.tensor([True]), ends[:-1]])]  # of the first decisions
    assert len(tokens.unique(dim=0)) == len(PLAN)  # members of a group draw different ones
    layouts: list[Callable[[], EnvBase | list[EnvBase]]] = [
        partial(make_env, 2),
        partial(make_env, 5),
        partial(make_env, 20),
        partial(SerialEnv, 3, make_env),
        lambda: [make_env(3), make_env(2)],
    ]
    for layout in layouts:
        assert_same(collect(layout()), alone)


def test_collectors_that_share_a_plan_draw_what_one_draws():
    whole = collect(make_env(4), number=7)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        mine = collect(make_env(2), PLAN[part], number=7)
        theirs = whole[torch.isin(whole["collector", "traj_ids"], torch.arange(len(PLAN))[part])]
        assert_same(mine.exclude("collector"), theirs.exclude("collector"))


class LosingEnv(ArmEnv):
    """Says after its second step that the second of its workers, of two slots each, was replaced."""

    num_workers = 2
    lost_workers: frozenset[int] = frozenset()
    steps = 0

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.steps += 1
        self.lost_workers = frozenset({1} if self.steps == 2 else ())
        return super()._step(tensordict)


def test_a_lost_worker_changes_nothing():
    env = LosingEnv(4, **SETTING)
    batch = collect(env)
    assert env.decisions > len(batch)  # some were taken twice
    assert_same(batch, collect(make_env()))


def test_another_seed_collection_or_group_draws_other_numbers():
    def tokens(**options: int) -> Tensor:
        return collect(make_env(9), EpisodePlan([(0, 1)], **options.pop("plan", {}), group_size=4), **options)[TOKENS][
            0
        ]

    first = tokens()
    assert torch.equal(tokens(), first)
    for options in ({"seed": 6}, {"number": 1}, {"plan": {"first_group_id": 1}}):
        assert not torch.equal(tokens(**options), first)


def test_collections_of_one_collector_draw_other_numbers():
    collector = GroupCollector(make_env(4), make_policy(), seed=5)
    first, second = (collector.collect(PLAN)[TOKENS][0] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(collect(make_env(4), number=1)[TOKENS][0], second)


def test_without_a_seed_one_is_drawn_from_the_global_generator():
    def draw() -> Tensor:
        torch.manual_seed(3)
        return GroupCollector(make_env(4), make_policy()).collect(PLAN)[TOKENS]

    assert torch.equal(draw(), draw())
    assert GroupCollector(make_env(), make_policy()).seed != GroupCollector(make_env(), make_policy()).seed


def test_the_seed_is_shown_to_the_policy_and_not_stored():
    seen: list[Tensor] = []

    def act(tensordict: TensorDictBase) -> TensorDictBase:
        seen.append(tensordict["decision_seed"])
        # A policy that returns another TensorDict, as the stock ones may.
        return tensordict.clone().set("action", torch.zeros(*tensordict.shape, CHUNK_SIZE, DIMS))

    batch = GroupCollector(make_env(2), act, seed=5).collect(PLAN)
    assert "decision_seed" not in batch.keys()
    seeds = torch.cat(seen)
    assert seeds.dtype == torch.int64 and seeds.shape == (len(batch), 1) and len(seeds.unique()) == len(batch)


def test_seeds_by_hand():

    plan = [Episode(11, 0, 4, 2), Episode(12, 0, 4, 0)]
    base = [
        np.random.SeedSequence(3, spawn_key=(6, *name)).generate_state(1, np.uint64)[0] for name in [(11, 2), (12, 0)]
    ]
    seeds = episode_seeds(3, 6, plan)
    assert seeds.tolist() == [int(word.astype(np.int64)) for word in base]
    golden = 0x9E3779B97F4A7C15  # SplitMix64's step: decision 2 is the output after three of them
    word = (int(base[1]) + 3 * golden) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ word >> shift) * factor % 2**64
    word ^= word >> 31
    assert decision_seeds(seeds, torch.tensor([0, 2]))[1].item() % 2**64 == word


def test_an_episode_that_would_draw_anothers_numbers_is_refused():
    with pytest.raises(ValueError, match="Member 0 of group 4 is planned twice"):
        collect(make_env(2), [Episode(4, 0, 1), Episode(4, 0, 2)])
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        GroupCollector(make_env(), make_policy(), seed=-1)
