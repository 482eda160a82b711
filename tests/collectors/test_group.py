"""GroupCollector: every planned episode once, nothing stepped or computed in vain, stored compactly."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch
from stubborn_env import FAILURE_AFTER, SUCCESS_AFTER, Policy, StubbornEnv
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv, StepCounter, TransformedEnv, check_env_specs

from torchrl_vla.collectors import EpisodePlan, GroupCollector, Progress
from torchrl_vla.collectors.lanes import Lane, Waiting
from torchrl_vla.collectors.slots import EnvSlots
from torchrl_vla.collectors.trajectories import TrajectoryRecorder
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.objectives import GRPOAdvantage


def texts(tensordict: TensorDictBase) -> list[str]:
    return tensordict.get("language_instruction").tolist()


PLAN = EpisodePlan([(0, 1), (1, 0), (2, 3), (0, 2)], group_size=3)


@pytest.fixture(scope="module")
def parallel_env():
    env = ParallelEnv(2, StubbornEnv, mp_start_method="fork")
    yield env
    env.close()


def make_env(layout: str, request: pytest.FixtureRequest) -> EnvBase:
    if layout == "parallel":
        return request.getfixturevalue("parallel_env")
    makers = {
        "single": StubbornEnv,
        "five slots": partial(StubbornEnv, 5),
        "more slots than episodes": partial(StubbornEnv, 20),
        "serial": partial(SerialEnv, 3, StubbornEnv),
        "transformed": lambda: TransformedEnv(StubbornEnv(5), StepCounter()),
        "two in turns": lambda: [StubbornEnv(3), StubbornEnv(2)],
    }
    return makers[layout]()


def test_the_test_env_is_sound():
    check_env_specs(StubbornEnv())
    check_env_specs(StubbornEnv(3))


@pytest.mark.processes
@pytest.mark.parametrize(
    "layout",
    ["single", "five slots", "more slots than episodes", "serial", "transformed", "parallel", "two in turns"],
)
def test_every_planned_episode_runs_to_its_end_once(layout, request):
    policy = Policy()
    batch = GroupCollector(make_env(layout, request), policy).collect(PLAN)
    lengths = [SUCCESS_AFTER if e.init_state_id % 2 == 0 else FAILURE_AFTER for e in PLAN]
    expected = [(e, t, t == n - 1) for e, n in zip(PLAN, lengths, strict=True) for t in range(n)]
    assert batch.batch_size == (len(expected),)
    for key in ("group_id", "task_id", "init_state_id"):
        assert batch[key].tolist() == [[getattr(e, key)] for e, _, _ in expected]
    assert batch["time"].flatten().tolist() == [t for _, t, _ in expected]
    assert batch["action"][:, 0].tolist() == [t for _, t, _ in expected]
    assert batch["observation", "image"][:, 0, 0, 0].tolist() == [t for _, t, _ in expected]
    assert batch["next", "done"].flatten().tolist() == [end for _, _, end in expected]
    succeeded = [end and e.init_state_id % 2 == 0 for e, _, end in expected]
    assert batch["next", "truncated"].equal(batch["next", "done"] & ~torch.tensor(succeeded).unsqueeze(-1))
    assert batch["next", "reward"].flatten().tolist() == succeeded
    assert texts(batch) == [f"task {e.task_id}" for e, _, _ in expected]
    ids = batch["collector", "traj_ids"]
    assert ids.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    # Neither a forward nor a step beyond the decisions that are in the batch.
    assert sum(len(given) for given in policy.batches) == len(batch)
    for given in policy.batches:
        assert texts(given) == [f"task {i}" for i in given["task_id"].flatten().tolist()]


class SlowEnv(StubbornEnv):
    """Steps only once another environment is stepping too, or has nothing left to step; then takes its time."""

    def __init__(self, num_envs: int, meeting: threading.Barrier, seconds: float) -> None:
        super().__init__(num_envs)
        self.meeting, self.seconds = meeting, seconds

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.meeting.wait(timeout=10)
        time.sleep(self.seconds)
        return super()._step(tensordict)


@pytest.mark.parametrize("seconds", [(0.0, 0.02), (0.02, 0.0)])
def test_environments_in_turns_simulate_at_the_same_time_and_speed_decides_nothing(seconds):
    plan = EpisodePlan.grid([0], [1, 3, 5, 7, 9, 11, 13, 15])  # all of four decisions: both sides step equally often
    meeting = threading.Barrier(2)
    envs = [SlowEnv(2, meeting, pause) for pause in seconds]
    policy = Policy()
    GroupCollector(envs, policy).collect(plan)
    served = [given["init_state_id"].flatten().tolist() for given in policy.batches]
    assert served == [*[[1, 3], [5, 7]] * 4, *[[9, 11], [13, 15]] * 4]


def test_the_last_episodes_are_spread_over_environments_and_workers():
    envs = [StubbornEnv(8), StubbornEnv(8)]
    policy = Policy()
    collector = GroupCollector(envs, policy)
    collector.collect(EpisodePlan.grid([0], [1, 3, 5]))
    assert sorted(len(given) for given in policy.batches[:2]) == [1, 2]
    env = SerialEnv(2, partial(StubbornEnv, 4))
    assert EnvSlots(env).in_turns.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_no_environment_loses_its_turn_to_a_start():
    """In the first environment episodes of one decision follow each other; the second one is busy with longer ones."""
    policy = Policy()
    plan = EpisodePlan.grid([0], [1, 0, 3, 5, *range(2, 26, 2)])
    GroupCollector([StubbornEnv(2), StubbornEnv(2)], policy).collect(plan)
    served = [given["init_state_id"].flatten().tolist() for given in policy.batches[:8]]
    # 6 and 8 are reserved for the second environment then.
    assert served == [[1, 0], [3, 5], [1, 2], [3, 5], [1, 4], [3, 5], [1, 10], [3, 5]]


def test_waiting_episodes_go_to_free_slots_before_any_is_reserved():
    lanes = [Lane(EnvSlots(StubbornEnv(4))) for _ in range(2)]
    waiting = Waiting(10, lanes)
    lanes[0].current[:3] = torch.tensor([97, 98, 99])
    assert waiting.take(lanes[0]) == [0] and lanes[0].reserved == [1, 2, 3]
    lanes[0].current[3] = 0
    assert waiting.take(lanes[1]) == [4, 5, 6, 7] and lanes[1].reserved == []
    lanes[1].current[:] = torch.arange(4, 8)
    waiting.put_back([1, 2, 3])
    lanes[0].reserved = []
    assert waiting.take(lanes[0]) == [] and lanes[0].reserved == [1, 2, 3]  # half of 1 2 3 8 9
    assert waiting.take(lanes[1]) == [] and lanes[1].reserved == [8, 9]


def test_no_environment_is_refused():
    with pytest.raises(ValueError, match="at least one environment"):
        GroupCollector([], Policy())


def test_finished_slots_are_not_stepped():
    env = StubbornEnv(5)
    batch = GroupCollector(env, Policy()).collect(PLAN)
    assert env.slot_steps == len(batch)


@pytest.mark.parametrize("make", [partial(ToyTrackingEnv, 4), partial(SerialEnv, 4, ToyTrackingEnv)])
def test_a_reset_leaves_the_other_slots_alone(make):
    """ToyTrackingEnv reports no last action for any slot of a reset; those that go on must still see theirs."""

    def act(tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("action", 2 * torch.rand(*tensordict.batch_size, 4, 2) - 1)

    torch.manual_seed(0)
    batch = GroupCollector(make(), act).collect(EpisodePlan.grid([0], range(16)))
    ends = batch["next", "done"].squeeze(-1)
    assert ends[batch["next", "success"].squeeze(-1)].all() and 0 < batch["next", "success"].sum() < 16
    last_action = batch["observation", "state"][1:, :2]
    expected = torch.where(ends[:-1, None], 0.0, batch["action"][:-1, -1])
    torch.testing.assert_close(last_action, expected)


def test_storage_is_compact():
    batch = GroupCollector(StubbornEnv(5), Policy()).collect(PLAN)
    assert batch["observation", "image"].dtype == torch.uint8
    keys = set(batch.keys(True, True))
    assert not {("vla_action", "logits"), ("next", "observation", "image")} & keys
    assert {key[1:] for key in keys if key[0] == "next"} == {
        ("reward",),
        ("done",),
        ("terminated",),
        ("truncated",),
        ("success",),
    }
    without = GroupCollector(StubbornEnv(5), Policy(), not_stored=[("observation", "image")]).collect(PLAN)
    assert ("observation", "image") not in without.keys(True) and ("vla_action", "logits") in without.keys(True)


def test_policies_without_parameters_and_iteration():
    def act(tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("action", torch.zeros(*tensordict.batch_size, 2))

    plans = EpisodePlan.stream({0: range(4), 1: range(4)}, groups=2, group_size=2, seed=0)
    seen = []
    for batch, _ in zip(GroupCollector(StubbornEnv(3), act, plans), range(3), strict=False):
        assert batch["next", "done"].sum() == 4
        seen += batch["collector", "traj_ids"].unique().tolist()
    assert seen == list(range(12))


def test_progress_counts_up_to_the_plan():
    calls: list[Progress] = []
    batch = GroupCollector(StubbornEnv(5), Policy(), progress=calls.append).collect(PLAN)
    assert calls[-1] == Progress(len(batch), len(PLAN), 6, len(PLAN))
    assert all(before.episodes <= after.episodes for before, after in zip(calls, calls[1:], strict=False))


def test_no_first_finisher_bias():
    """Successes are four times shorter than failures, and half of the episodes succeed."""
    plan = EpisodePlan.grid([0], range(64))
    batch = GroupCollector(StubbornEnv(8), Policy()).collect(plan)
    assert batch["next", "success"].sum().item() / len(plan) == 0.5
    torch.manual_seed(0)
    collector = Collector(
        StubbornEnv(8), policy=None, trajs_per_batch=4, traj_format="cat", frames_per_batch=8, total_frames=-1,
        reset_at_each_iter=True,
    )  # fmt: skip
    batches = [batch for _, batch in zip(range(50), collector, strict=False)]
    collector.shutdown()
    success = torch.cat([batch["next", "success"][batch["next", "done"]] for batch in batches])
    assert success.float().mean().item() > 0.6


def test_into_the_replay_buffer():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), sampler=SamplerWithoutReplacement(), batch_size=4)
    buffer.append_transform(GRPOAdvantage())
    mixed = EpisodePlan([(0, 1), (1, 0)], group_size=4)
    assert len(buffer.extend(GroupCollector(StubbornEnv(3), Policy()).collect(mixed))) == 0  # each group is all one way
    batch = GroupCollector(StubbornEnv(3), Policy()).collect(mixed)
    batch["group_id"] = torch.zeros_like(batch["group_id"])
    buffer.extend(batch)
    assert len(buffer) == 20
    for sample in buffer:
        assert texts(sample) == [f"task {i}" for i in sample["task_id"].flatten().tolist()]


def test_an_env_that_starts_elsewhere_is_noticed():
    with pytest.raises(RuntimeError, match="its reset must read 'task_id'"):
        GroupCollector(StubbornEnv(5, ignores_requests=True), Policy()).collect(PLAN)


def test_an_empty_plan_is_refused():
    with pytest.raises(ValueError, match="no episodes"):
        GroupCollector(StubbornEnv(), Policy()).collect([])


def test_an_env_that_does_not_report_its_start_is_refused():
    env = StubbornEnv(5)
    del env.observation_spec["init_state_id"]
    with pytest.raises(ValueError, match="init_state_id"):
        GroupCollector(env, Policy())


def test_the_recorder_frees_rows_as_it_places_them():
    recorder = TrajectoryRecorder(3)
    for step in range(3):
        alive = torch.arange(step, 3)
        recorder.append(alive, TensorDict({"x": alive * 10 + step}, [len(alive)]))
    assert recorder.lengths.tolist() == [1, 2, 3]
    assert recorder.finish()["x"].tolist() == [0, 10, 11, 20, 21, 22]
    assert not recorder._rows


def test_works_with_a_tensordict_sequential_policy():
    policy = TensorDictSequential(
        TensorDictModule(lambda t: t.float().expand(*t.shape[:-1], 2), in_keys=["time"], out_keys=["action"]),
        TensorDictModule(lambda a: a.sum(-1, True), in_keys=["action"], out_keys=["extra"]),
    )
    batch = GroupCollector(StubbornEnv(), policy).collect(PLAN[:3])
    assert batch["extra"].flatten().tolist() == [0, 2, 4, 6] * 3
