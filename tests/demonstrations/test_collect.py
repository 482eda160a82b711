"""Collecting demonstrations: by the real expert in the real simulator, and what happens when workers misbehave."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scripted_workers
import torch

from torchrl_vla.datasets import DemonstrationDataset
from torchrl_vla.demonstrations import collect
from torchrl_vla.demonstrations.collect import collect_demonstrations
from torchrl_vla.demonstrations.record import Job
from torchrl_vla.envs import processes
from torchrl_vla.envs.memory import memory_needed
from torchrl_vla.modules.action_tokenizer import ActionTokenizer

pytestmark = [pytest.mark.simulator, pytest.mark.processes]

SUITE = "libero_spatial"


@pytest.fixture
def options() -> dict:
    return dict(task_suite=SUITE, task_ids=[0], num_workers=1, camera_size=48)


def test_the_expert_solves_a_task(tmp_path: Path, options: dict):
    collect_demonstrations(tmp_path, episodes_per_task=1, init_state_ids=[1], **options)
    dataset = DemonstrationDataset(tmp_path)
    assert dataset.index.outcomes == {"000000": "success"}
    episode = dataset.episodes["000000"]
    assert episode["init_state_id"] == 1 and "black bowl" in episode["instruction"]
    assert torch.equal(episode["action"], episode["executed_action"])
    assert episode["action"].abs().max() <= 1.0
    # The gripper opens, closes on the bowl and opens again: the state's fingers follow the action's sign.
    gripper = episode["action"][:, 6]
    assert gripper[0] == -1.0 and gripper.max() == 1.0 and (gripper[-8:] == -1.0).all()
    opening = episode["state"][:, 6] - episode["state"][:, 7]
    assert opening[gripper == -1.0].max() > 0.07 > 0.03 > opening[gripper == 1.0].min()
    assert dataset.statistics["num_trajectories"] == 1
    samples = dataset.samples(ActionTokenizer(dataset.statistics), image_size=28)
    images = samples["observation", "image"].float()
    # Upright: the grey wall is above, the light table below.
    assert images[:, :, 14:].mean() > images[:, :, :10].mean()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """Put one of the stand-ins in the worker's place; forked, since they touch no simulator."""
    monkeypatch.setattr(processes, "prepare_processes", lambda: "fork")
    return lambda worker: monkeypatch.setattr(collect, "run_worker", worker)


def test_workers_that_die_hang_or_fail_cost_their_episode_only(tmp_path: Path, options: dict, scripted):
    scripted(scripted_workers.unreliable)
    index = collect_demonstrations(tmp_path, episodes_per_task=6, timeout=2.0, **{**options, "num_workers": 3})
    assert index.counts() == {0: {"success": 3, "failed": 1, "dropped": 2}}
    assert index.outcomes.pop("000002").startswith("dropped: no answer within 2 s")
    assert index.outcomes == {
        "000000": "failed",
        "000001": "success",
        "000003": "dropped: ValueError: no grasp",
        "000004": "success",
        "000005": "success",
    }
    assert sorted(DemonstrationDataset(tmp_path).episodes) == ["000001", "000004", "000005"]


def test_a_collection_goes_on_with_what_is_missing(tmp_path: Path, options: dict, scripted):
    scripted(scripted_workers.unreliable)
    collect_demonstrations(tmp_path, episodes_per_task=2, **options)
    kept, damaged = (tmp_path / "episodes" / name for name in ("000001", "000004"))
    written = (kept / "action.memmap").stat().st_mtime_ns
    damaged.mkdir()
    (tmp_path / "episodes" / ".partial-000005-1").mkdir()
    scripted(scripted_workers.reliable)
    index = collect_demonstrations(tmp_path, episodes_per_task=6, **options)
    # The failed episode is not tried again: it would fail again.
    assert index.counts() == {0: {"success": 5, "failed": 1}}
    assert (kept / "action.memmap").stat().st_mtime_ns == written
    assert sorted(path.name for path in kept.parent.iterdir()) == [f"00000{i}" for i in range(1, 6)]
    with pytest.raises(ValueError, match="begun with camera_size=48, not 64"):
        collect_demonstrations(tmp_path, episodes_per_task=2, **{**options, "camera_size": 64})


def test_workers_that_would_not_fit_are_refused_before_any_is_started(
    tmp_path: Path, options: dict, scripted, monkeypatch: pytest.MonkeyPatch
):
    scripted(scripted_workers.reliable)
    monkeypatch.setattr(collect, "available_memory", lambda: memory_needed(2, 2, 1))
    out, wanted = tmp_path / "new", {**options, "num_workers": 4}
    with pytest.raises(ValueError, match=r"4 environments in 4 process.* use fewer workers \(at most 2, "):
        collect_demonstrations(out, episodes_per_task=6, **wanted)
    assert not out.exists()
    # Two are enough for what is left, however many there may be; and nothing is needed where nothing is left.
    collect_demonstrations(out, episodes_per_task=2, **wanted)
    monkeypatch.setattr(collect, "available_memory", lambda: 0.0)
    assert collect_demonstrations(out, episodes_per_task=2, **wanted).counts() == {0: {"success": 2}}


def test_a_full_disk_stops_the_collection_and_leaves_it_readable(tmp_path: Path, options: dict, scripted):
    scripted(scripted_workers.disk_full_at_second)
    with pytest.raises(OSError, match="disk is full"):
        collect_demonstrations(tmp_path, episodes_per_task=3, **options)
    assert list(DemonstrationDataset(tmp_path).episodes) == ["000000"]


def test_a_task_that_the_expert_cannot_do_ends_the_collection(tmp_path: Path, options: dict, scripted):
    scripted(scripted_workers.refusing)
    with pytest.raises(ValueError, match="task_ids must leave out task 0: the drawer is closed."):
        collect_demonstrations(tmp_path, episodes_per_task=1, **options)


def test_no_success_at_all_is_explained(tmp_path: Path, options: dict, scripted):
    scripted(scripted_workers.always_failing)
    with pytest.raises(ValueError, match="2 episodes were tried, 2 of them failed"):
        collect_demonstrations(tmp_path, episodes_per_task=2, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(episodes_per_task=0), "episodes_per_task must be at least 1"),
        (dict(perturb_prob=1.5), "perturb_prob"),
        (dict(init_state_ids=[3, 50]), r"0\.\.49, got \[50\]"),
        (dict(episodes_per_task=51), "record some episodes twice"),
        (dict(task_suite="libero_spacial"), "libero_spatial"),
        (dict(task_ids=[10]), "task_id=10"),
    ],
)
def test_bad_options_are_explained_before_anything_is_written(
    tmp_path: Path, options: dict, changes: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        collect_demonstrations(tmp_path / "new", **{**options, **changes})
    assert not (tmp_path / "new").exists()


def test_goals_of_an_unknown_kind_are_refused_before_anything_is_written(tmp_path: Path, options: dict, monkeypatch):
    monkeypatch.setattr(collect, "can_reach", lambda goals: all(goal.predicate in ("on", "in") for goal in goals))
    with pytest.raises(ValueError, match=r"no skill for what tasks 7, 0 of libero_goal ask.*: 1,2,3,4,5,6,8,9\."):
        collect_demonstrations(tmp_path / "new", **{**options, "task_suite": "libero_goal", "task_ids": [1, 7, 0]})
    assert not (tmp_path / "new").exists()


def test_workers_stay_with_their_task_and_join_where_most_is_left():
    jobs = [Job(f"{task:02d}{i:04d}", task, i, False) for task, count in ((0, 2), (1, 5)) for i in range(count)]
    queue = collect._Jobs(jobs)
    assert queue.take(-1, Counter()).task_id == 1
    assert queue.take(0, Counter({1: 1})).task_id == 0
    # Four left of task 1 for two workers, one of task 0 for one: the newcomer joins task 1.
    assert queue.take(7, Counter({1: 1, 0: 1})).task_id == 1
    taken = [queue.take(0, Counter()) for _ in range(4)]
    assert [job.task_id for job in taken] == [0, 1, 1, 1]
    assert queue.take(0, Counter()) is None


def test_second_visits_to_a_state_are_always_pushed():
    plan = collect._plan(3, [5, 6], 200, perturb_prob=0.5, seed=0)
    assert [job.init_state_id for job in plan[:4]] == [5, 6, 5, 6]
    assert all(job.perturbed for job in plan[2:])
    states = list(range(200))
    share = np.mean([job.perturbed for job in collect._plan(3, states, 200, perturb_prob=0.5, seed=0)])
    assert 0.4 < share < 0.6
    assert not any(job.perturbed for job in collect._plan(3, states, 200, perturb_prob=0.0, seed=0))
