"""How environments are shared out over processes."""

from __future__ import annotations

import pytest
import torch

from torchrl_vla.collectors import EpisodePlan, GroupCollector
from torchrl_vla.envs import factory
from torchrl_vla.envs.factory import choose_workers, make_env
from torchrl_vla.envs.libero import LiberoEnv
from torchrl_vla.envs.watchdog import WatchedParallelEnv


@pytest.mark.parametrize(
    ("num_envs", "cores", "memory", "workers"),
    [
        (8, 2, 24e9, 2),
        (6, 4, 24e9, 3),
        (7, 4, 24e9, 1),
        (64, 16, 12e9, 4),
        (64, 16, 1e12, 16),
        (1, 16, 1e12, 1),
        (4, 4, 0.0, 1),
    ],
)
def test_workers_fit_cores_memory_and_number(num_envs, cores, memory, workers):
    assert choose_workers(num_envs, cores=cores, memory=memory) == workers


def test_models_that_do_not_share_take_memory_from_workers():
    """Four environments of four models each: 4.4 GB per process and 0.45 GB of libraries."""
    assert choose_workers(16, models=4, cores=8, memory=19.48e9) == 4
    assert choose_workers(16, models=4, cores=8, memory=19.47e9) == 2


def test_more_than_memory_allows_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"100000 environments in 1 process.* need some 501\.1 GB .*set num_envs=\d+"):
        make_env("libero_spatial", num_envs=100_000, workers=1, image_size=1)
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        make_env("libero_spatial", num_envs=0)


def test_uneven_shares_are_refused():
    with pytest.raises(ValueError, match="5 environments cannot be shared evenly by 2 workers"):
        make_env("libero_spatial", num_envs=5, workers=2)


@pytest.mark.simulator
@pytest.mark.processes
def test_several_environments_in_each_of_two_processes():
    """Five episodes in 2 x 2 slots: every one is run once, whichever worker has a free slot."""
    env = make_env("libero_spatial", num_envs=4, workers=2, task_ids=[0, 1], image_size=32, max_episode_steps=16)
    try:
        assert env.batch_size == torch.Size([2, 2])
        starts = env.reset()
        chosen = torch.cat([starts["task_id"], starts["init_state_id"]], -1).flatten(0, 1).tolist()
        assert sorted(chosen) == [[0, 0], [0, 1], [1, 0], [1, 1]], "no episode in two workers"

        def policy(tensordict):
            return tensordict.set("action", torch.zeros(*tensordict.shape, 8, 7))

        plan = EpisodePlan([(0, 3), (1, 4), (0, 5), (1, 6), (0, 7)])
        batch = GroupCollector(env, policy).collect(plan)
    finally:
        env.close()
    done = batch["next", "done"].squeeze(-1)
    assert batch["init_state_id"][done].flatten().tolist() == [3, 4, 5, 6, 7]
    assert batch["task_id"][done].flatten().tolist() == [0, 1, 0, 1, 0]
    assert batch["next", "num_control_steps"].flatten().tolist() == [8] * 10
    assert len(set(batch["language_instruction"])) == 2


def test_parts_share_the_workers_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "_in_processes", lambda suite, numbers, workers, each, *rest: (numbers, each))
    parts = {
        workers: factory.make_envs("libero_spatial", num_envs=num_envs, workers=workers)
        for workers, num_envs in ((2, 8), (6, 6), (7, 14), (8, 32))
    }
    assert parts == {
        2: [(range(1), 4), (range(1, 2), 4)],
        6: [(range(2), 1), (range(2, 4), 1), (range(4, 6), 1)],
        7: [(range(7), 2)],
        8: [(range(first, first + 2), 4) for first in (0, 2, 4, 6)],
    }


def test_workers_draw_on_all_gpus_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "WatchedParallelEnv", lambda *args, worker_variables, **options: worker_variables)
    monkeypatch.setattr(factory, "egl_devices", lambda: (0, 3))
    monkeypatch.setattr(factory, "available_memory", lambda: 64e9)  # whatever this machine has left
    parts = factory.make_envs("libero_spatial", num_envs=12, workers=12)
    chosen = [[variables["MUJOCO_EGL_DEVICE_ID"] for variables in part] for part in parts]
    assert chosen == [["0", "3", "0"], ["3", "0", "3"]] * 2
    monkeypatch.setattr(factory, "egl_devices", tuple)
    assert factory.make_envs("libero_spatial", num_envs=2, workers=2) == [None, None]


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_what_may_hang_runs_in_a_process_that_is_watched(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(factory, "configure_rendering", lambda: backend)
    monkeypatch.setattr(factory, "available_memory", lambda: 64e9)
    (env,) = factory.make_envs("libero_spatial", num_envs=3, workers=1, worker_timeout=7.0)
    if backend == "osmesa":
        assert isinstance(env, LiberoEnv) and env.batch_size == torch.Size([3])
    else:
        assert isinstance(env, WatchedParallelEnv) and env.batch_size == torch.Size([1, 3])
        assert env.num_workers == 1 and env.worker_timeout == 7.0
