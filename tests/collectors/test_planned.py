"""GroupCollector as one of TorchRL's collectors: batches by size, frames, state, weights, seeds, hooks, shutdown."""

from __future__ import annotations

import weakref
from functools import partial
from itertools import islice

import pytest
import torch
from stubborn_env import FAILURE_AFTER, SUCCESS_AFTER, Policy, StubbornEnv
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import nn
from torchrl.collectors import BaseCollector
from torchrl.envs import SerialEnv

from torchrl_vla.collectors import EpisodePlan, GroupCollector, Progress
from torchrl_vla.envs.toy import ToyTrackingEnv


class RandomActions(nn.Module):
    """Acts in the toy environment as each decision's seed says."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        seeds = tensordict["decision_seed"].flatten().tolist()
        chunks = [torch.rand(4, 2, generator=torch.Generator().manual_seed(seed % 2**63)) for seed in seeds]
        return tensordict.set("action", 2 * torch.stack(chunks) - 1)


def groups(group_size: int = 4, seed: int = 0):
    return EpisodePlan.stream({0: range(50)}, groups=1, group_size=group_size, seed=seed)


def make(**options) -> GroupCollector:
    return GroupCollector(ToyTrackingEnv(3), RandomActions(), groups(), seed=2, **options)


def comparable(batch: TensorDictBase) -> TensorDictBase:
    return batch.exclude(("observation", "image"), "language_instruction")  # the images are the environment's own


def assert_same(batches: list[TensorDictBase], others: list[TensorDictBase]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for key, value in comparable(batch).items(True, True):
            assert torch.equal(value, other[key]), key


def test_is_a_torchrl_collector_and_counts_its_frames():
    plans = [EpisodePlan([(0, 1)], group_size=2), EpisodePlan([(0, 0)], group_size=3), EpisodePlan([(0, 1)])]
    collector = GroupCollector(StubbornEnv(2), Policy(), plans)
    assert isinstance(collector, BaseCollector)
    assert [len(batch) for batch in collector] == [2 * FAILURE_AFTER, 3 * SUCCESS_AFTER, FAILURE_AFTER]
    assert collector.stats() == {"frames": 2 * FAILURE_AFTER + 3 * SUCCESS_AFTER + FAILURE_AFTER, "batches": 3}
    assert collector.next() is None
    with pytest.raises(TypeError, match="has no length"):
        len(collector)


def test_total_frames_end_the_iteration_after_the_batch_that_reaches_them():
    plans = [EpisodePlan([(0, 1)])] * 5
    collector = GroupCollector(StubbornEnv(2), Policy(), plans, total_frames=FAILURE_AFTER + 1)
    assert len(list(collector)) == 2
    assert collector.stats()["completed"]


def test_a_later_iteration_goes_on_with_the_next_plan():
    collector = make()
    first = [next(iter(collector)), *islice(collector, 2)]
    assert_same(first, list(islice(make(), 3)))


def test_batches_are_whole_groups_of_enough_steps():
    mean_steps = 0.0
    for batch in islice(make(min_control_steps=200), 3):
        steps = int(batch["next", "num_control_steps"].sum())
        assert steps >= 200
        done = batch["next", "done"].squeeze(-1)
        group_ids, episodes = batch["group_id"][done].unique(return_counts=True)
        assert episodes.tolist() == [4] * len(episodes)
        if mean_steps:  # the last batch's episodes say how many groups it takes
            assert len(group_ids) >= 1.1 * 200 / (4 * mean_steps)
        mean_steps = steps / int(done.sum())


def test_the_plans_of_a_batch_do_not_depend_on_slots():
    batches = list(islice(make(min_control_steps=150), 3))
    other = GroupCollector(ToyTrackingEnv(7), RandomActions(), groups(), seed=2, min_control_steps=150)
    assert_same(batches, list(islice(other, 3)))


def test_steps_are_decisions_where_the_environment_does_not_count_control_steps():
    plans = [EpisodePlan([(0, 1)], first_group_id=group) for group in range(5)]
    for least, sizes in ((1, [1, 1, 1, 1, 1]), (FAILURE_AFTER + 1, [2, 2, 1])):
        collector = GroupCollector(StubbornEnv(2), Policy(), plans, min_control_steps=least)
        assert [len(batch) // FAILURE_AFTER for batch in collector] == sizes


@pytest.mark.parametrize("min_control_steps", [None, 100])
def test_resuming_gives_the_batches_that_come_next(min_control_steps):
    undisturbed = list(islice(make(min_control_steps=min_control_steps), 5))
    stopped = make(min_control_steps=min_control_steps)
    first = list(islice(stopped, 2))
    resumed = make(min_control_steps=min_control_steps)
    resumed.set_seed(99)  # the state brings the run's own back
    resumed.load_state_dict(stopped.state_dict())
    assert_same([*first, *islice(resumed, 3)], undisturbed)
    assert resumed.stats()["frames"] == sum(map(len, undisturbed))


@pytest.mark.parametrize("resumed", [False, True])
def test_an_interrupted_batch_is_run_again(resumed):
    undisturbed = list(islice(make(min_control_steps=100), 3))
    decisions = 0

    def interrupt(progress: Progress) -> None:
        nonlocal decisions
        decisions += 1
        if decisions == 30:
            raise KeyboardInterrupt

    collector = make(min_control_steps=100, progress=interrupt)
    batches = []
    with pytest.raises(KeyboardInterrupt):
        for batch in collector:
            batches.append(batch)
    assert 0 < len(batches) < 3
    if resumed:
        state = collector.state_dict()
        collector = make(min_control_steps=100)
        collector.load_state_dict(state)
    assert_same([*batches, *islice(collector, 3 - len(batches))], undisturbed)


def test_a_state_that_lies_behind_is_refused():
    collector = make()
    state = collector.state_dict()
    next(iter(collector))
    with pytest.raises(ValueError, match="taken after 0 plans, and this collector has taken 1"):
        collector.load_state_dict(state)


def test_a_batch_is_not_kept_while_the_next_is_collected(monkeypatch: pytest.MonkeyPatch):
    collector = make(min_control_steps=20)
    collect, given = collector.collect, []

    def observed(plan):
        assert not any(action() is not None for action in given)
        part = collect(plan)
        given.append(weakref.ref(part["action"]))
        return part

    monkeypatch.setattr(collector, "collect", observed)
    batches = iter(collector)
    for number in range(1, 4):
        batch = next(batches)
        assert len(given) == number and given[-1]() is not None
        del batch


def make_linear() -> TensorDictModule:
    network = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(-1, (4, 2)))
    return TensorDictModule(network, in_keys=[("observation", "state")], out_keys=["action"])


@pytest.mark.parametrize(
    "form",
    [
        lambda module: module,
        TensorDict.from_module,
        lambda module: TensorDict.from_module(module).data.clone(),
        lambda module: TensorDictParams(TensorDict.from_module(module)),
        lambda module: module.state_dict(),
        lambda module: {name: value for name, value in module.state_dict().items() if "weight" in name},
    ],
    ids=["module", "parameters", "tensordict", "of a loss", "state_dict", "part"],
)
def test_weights_are_copied_into_the_policy(form):
    policy, learner = make_linear(), make_linear()
    collector = GroupCollector(ToyTrackingEnv(3), policy, groups())
    parameters = dict(policy.named_parameters())
    versions = {name: parameter._version for name, parameter in parameters.items()}
    given = form(learner)
    collector.update_policy_weights_(given)
    for name, parameter in policy.named_parameters():
        assert parameter is parameters[name]
        if isinstance(given, dict) and name not in given:
            assert not torch.equal(parameter, learner.get_parameter(name))
            continue
        assert torch.equal(parameter, learner.get_parameter(name))
        assert parameter._version > versions[name]  # copies of a policy's own, such as fused adapters, notice
    assert parameters and all(parameter.requires_grad for parameter in parameters.values())


def test_updating_the_weights_of_the_learners_own_policy_changes_nothing():
    policy = make_linear()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    collector = GroupCollector(ToyTrackingEnv(3), policy, groups())
    part = nn.ModuleList([policy])  # under other names
    for call in (
        {},
        {"policy": policy},
        {"policy": part},
        {"weights": TensorDict.from_module(policy)},
        {"model_id": "policy"},
    ):
        collector.update_policy_weights_(**call)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    with pytest.raises(KeyError, match="model_id='critic' is unknown"):
        collector.update_policy_weights_(policy, model_id="critic")
    with pytest.raises(TypeError, match="has no weights to update"):
        GroupCollector(ToyTrackingEnv(3), lambda tensordict: tensordict).update_policy_weights_(policy)


def test_set_seed_seeds_episodes_and_environments():
    seeds: list[int] = []

    class Seeded(ToyTrackingEnv):
        def _set_seed(self, seed: int | None) -> None:
            seeds.append(seed)
            super()._set_seed(seed)

    collector = GroupCollector([Seeded(2), Seeded(1)], RandomActions(), groups(), seed=0)
    seeds.clear()
    following = collector.set_seed(2)
    assert collector.seed == 2 and seeds[0] == 2 and seeds[1] != 2 and following not in seeds
    assert_same([next(iter(collector))], [next(iter(make()))])
    with pytest.raises(ValueError, match="seed=-3"):
        collector.set_seed(-3)


@pytest.mark.parametrize("min_control_steps", [None, 60])
def test_the_first_frames_are_random_and_belong_to_their_episodes(min_control_steps):
    def stand_still(tensordict: TensorDictBase) -> TensorDictBase:
        tensordict["written"] = torch.ones(len(tensordict), 1)
        return tensordict.set("action", torch.zeros(*tensordict.shape, 4, 2))

    def collect(slots: int) -> list[TensorDictBase]:
        torch.seed()
        collector = GroupCollector(ToyTrackingEnv(slots), stand_still, groups(), seed=2, init_random_frames=30,
                                   min_control_steps=min_control_steps)  # fmt: skip
        return list(islice(collector, 4))

    three, five = collect(3), collect(5)
    assert_same(three, five)
    frames = torch.tensor([0, *map(len, three)]).cumsum(0)[:-1]
    moves = [bool(batch["action"].any()) for batch in three]
    assert moves == (frames < 30).tolist() and 0 < sum(moves) < 4
    assert ["written" not in batch.keys() for batch in three] == moves
    assert ((-1 <= three[0]["action"]) & (three[0]["action"] <= 1)).all()


def test_hooks_are_called_around_each_batch():
    calls: list[object] = []
    collector = GroupCollector(
        StubbornEnv(2), Policy(), [EpisodePlan([(0, 1)])] * 2,
        pre_collect_hook=lambda: calls.append("before"), post_collect_hook=lambda batch: calls.append(len(batch)),
    )  # fmt: skip
    list(collector)
    assert calls == ["before", FAILURE_AFTER, "before", FAILURE_AFTER, "before"]


def test_shutdown_closes_the_environments():
    envs = [SerialEnv(2, partial(StubbornEnv)), SerialEnv(1, partial(StubbornEnv))]
    collector = GroupCollector(envs, Policy(), [EpisodePlan([(0, 1), (0, 1)])])
    list(collector)
    collector.shutdown(close_env=False)
    assert not envs[0].is_closed
    collector.shutdown()
    collector.shutdown()
    assert all(env.is_closed for env in envs)


@pytest.mark.parametrize("options", [{"min_control_steps": 0}, {"seed": -1}])
def test_bad_numbers(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} must"):
        GroupCollector(ToyTrackingEnv(1), RandomActions(), **options)
