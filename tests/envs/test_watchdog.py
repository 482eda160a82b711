"""Workers that die or hang are replaced, and nothing of a batch shows it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fragile_workers import FragileEnv, LingeringEnv, VariableEnv
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase, check_env_specs

from torchrl_vla.collectors import EpisodePlan, GroupCollector
from torchrl_vla.envs import watchdog
from torchrl_vla.envs.factory import make_env
from torchrl_vla.envs.watchdog import WatchedParallelEnv

pytestmark = pytest.mark.processes

#: Seconds. What hangs is waited for; else a busy machine must not look like a hanging worker.
HANG, LONG = 1.0, 20.0
#: In two workers of two environments, 7 runs beside others that are further on or done.
PLAN = EpisodePlan([(0, 1), (1, 2), (2, 7), (3, 3), (4, 5), (5, 4), (6, 9)])


def act(tensordict: TensorDictBase) -> TensorDictBase:
    """Depends on the episode and on everything in it so far."""
    seen = tensordict["total"] + tensordict["time"] * 10 + tensordict["init_state_id"]
    return tensordict.set("action", torch.cat([seen, -0.5 * seen], -1).float())


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[..., WatchedParallelEnv]]:
    # New workers are copies of one process that has imported what they need.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torchrl.envs"])
    made: list[WatchedParallelEnv] = []

    def make(*, num_envs: int | None = 2, timeout: float = LONG, **grief: object) -> WatchedParallelEnv:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        worker = partial(FragileEnv, num_envs, folder, **grief)
        made.append(WatchedParallelEnv(2, worker, worker_timeout=timeout, mp_start_method="forkserver"))
        return made[-1]

    yield make
    for env in made:
        env.close(raise_if_closed=False)


@pytest.mark.parametrize(
    ("grief", "at", "num_envs"),
    [
        ("die", "step", 2),
        ("die", "reset", None),
        ("hang", "step", None),
        ("hang", "reset", 2),
        ("raise", "step", 2),
        ("raise", "reset", 2),
    ],
)
def test_a_batch_is_as_if_nothing_had_happened(
    watched: Callable[..., WatchedParallelEnv], grief: str, at: str, num_envs: int | None
) -> None:
    undisturbed = GroupCollector(FragileEnv(3, Path()), act).collect(PLAN)
    env = watched(num_envs=num_envs, grief=grief, at=at, timeout=HANG if grief == "hang" else LONG)
    env.reset()
    before = list(env._workers)
    batch = GroupCollector(env, act).collect(PLAN)
    assert sum(old is not new for old, new in zip(before, env._workers, strict=True)) == 1
    assert set(batch.keys(True, True)) == set(undisturbed.keys(True, True))
    for key, value in undisturbed.items(True, True):
        assert torch.equal(batch[key], value), key
    # And so does the next batch, in the new workers.
    again = GroupCollector(env, act).collect(PLAN)
    assert torch.equal(again["total"], undisturbed["total"])


def test_of_environments_that_take_turns_only_one_is_disturbed(watched: Callable[..., WatchedParallelEnv]) -> None:
    undisturbed = GroupCollector(FragileEnv(3, Path()), act).collect(PLAN)
    batch = GroupCollector([watched(grief="die", num_envs=None), watched(grief="die")], act).collect(PLAN)
    for key, value in undisturbed.items(True, True):
        assert torch.equal(batch[key], value), key


def test_a_worker_that_dies_between_two_commands(watched: Callable[..., WatchedParallelEnv]) -> None:
    env = watched()
    undisturbed = GroupCollector(FragileEnv(3, Path()), act).collect(PLAN)
    calls = 0

    def murderous(tensordict: TensorDictBase) -> TensorDictBase:
        nonlocal calls
        calls += 1
        if calls in (2, 5):
            worker = env._workers[calls % 2]
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        return act(tensordict)

    batch = GroupCollector(env, murderous).collect(PLAN)
    assert torch.equal(batch["total"], undisturbed["total"])


def test_a_stock_rollout_sees_a_truncated_episode(watched: Callable[..., WatchedParallelEnv]) -> None:
    env = watched(num_envs=None, grief="die")
    state = env.reset()
    state["init_state_id"], state["task_id"] = torch.tensor([[7], [9]]), torch.tensor([[1], [2]])
    state = env.reset(state.select("init_state_id", "task_id"))
    for _ in range(2):
        _, state = env.step_and_maybe_reset(act(state))
        assert env.lost_workers == frozenset()
    last, state = env.step_and_maybe_reset(act(state))
    assert env.lost_workers == {0}
    following = last["next"]
    assert following["truncated"].flatten().tolist() == following["done"].flatten().tolist() == [True, False]
    assert not following["terminated"].any() and not following["reward"].any()
    assert following["time"].flatten().tolist() == [0, 3] and state["time"].flatten().tolist() == [0, 3]
    last, _ = env.step_and_maybe_reset(act(state))
    assert last["next", "time"].flatten().tolist() == [1, 4] and env.lost_workers == frozenset()


def test_a_partial_reset_merges_as_torchrl_does(
    watched: Callable[..., WatchedParallelEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[TensorDictBase, TensorDictBase]:
        env = watched()
        state = act(env.reset())
        for _ in range(2):
            _, state = env.step_and_maybe_reset(act(state))
        # One of a worker's two, and none of the other's.
        state["_reset"] = torch.tensor([[[False], [True]], [[False], [False]]])
        state["init_state_id"][0, 1] = 4
        state["memory"] = torch.arange(4.0).reshape(2, 2, 1) + 1
        state["total"][1, 0] = 17.0
        return state, env.reset(state)

    request, merged = run()
    assert merged is request and merged["time"].flatten().tolist() == [0, 0, 0, 0]
    monkeypatch.delattr(WatchedParallelEnv, "_reset_proc_data")
    _, expected = run()
    assert set(merged.keys(True, True)) == set(expected.keys(True, True))
    for key, value in expected.items(True, True):
        assert torch.equal(merged[key], value), key


def test_specs_seeds_and_reopening(watched: Callable[..., WatchedParallelEnv]) -> None:
    env = watched()
    check_env_specs(env)
    seed = env.set_seed(3)
    os.kill(env._workers[1].pid, signal.SIGKILL)
    env._workers[1].join()
    assert env.set_seed(3) == seed
    env.close()
    assert env.reset()["time"].shape == (2, 2, 1)


@pytest.mark.parametrize(
    ("grief", "cause"),
    [("die", "was ended by SIGKILL"), ("hang", r"did not answer within 1 s"), ("raise", "the driver failed")],
)
def test_giving_up_names_the_cause_and_the_way_out(
    watched: Callable[..., WatchedParallelEnv], grief: str, cause: str
) -> None:
    env = watched(grief=grief, times=100, timeout=HANG if grief == "hang" else LONG)
    workers = []
    with pytest.raises(RuntimeError, match=rf"(?s)failed 3 times in a row.*{cause}.*MUJOCO_GL=osmesa"):
        env.reset()
        workers = list(env._workers)
        GroupCollector(env, act).collect(PLAN)
    assert env.is_closed and not any(worker.is_alive() for worker in workers)
    env.close()  # as a `finally` would, which must not hide the error
    # Twice it was replaced.
    assert len(list(env.create_env_fn[0].args[1].iterdir())) == 3


def test_a_value_error_is_raised_as_it_is(watched: Callable[..., WatchedParallelEnv]) -> None:
    env = watched(grief="value")
    with pytest.raises(ValueError, match="^the action is not a number$"):
        GroupCollector(env, act).collect(PLAN)
    assert env.is_closed


def test_a_timeout_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"worker_timeout must be positive, got 0\.0"):
        WatchedParallelEnv(2, FragileEnv, worker_timeout=0.0)


def test_libero_goes_on_after_a_kill() -> None:
    """Two workers with two simulators each; one is killed in the middle of its episodes."""
    plan = EpisodePlan([(0, 3), (1, 4), (0, 5), (1, 6), (0, 7)])

    def collect(workers: int, harm: Callable[[EnvBase, int], None]) -> TensorDictBase:
        options = {"task_ids": [0, 1], "image_size": 32, "max_episode_steps": 24, "fidelity": "fast"}
        env = make_env("libero_spatial", num_envs=4, workers=workers, **options)
        decisions = 0

        def policy(tensordict: TensorDictBase) -> TensorDictBase:
            nonlocal decisions
            decisions += 1
            harm(env, decisions)
            position = tensordict["observation", "state"][:, None, :7]
            return tensordict.set("action", torch.cos(position * torch.arange(1, 9)[:, None]))

        try:
            return GroupCollector(env, policy).collect(plan)
        finally:
            env.close()

    def harm(env: EnvBase, decisions: int) -> None:
        if decisions == 3:
            os.kill(env.base_env._workers[1].pid, signal.SIGKILL)

    undisturbed, batch = collect(1, lambda env, decisions: None), collect(2, harm)
    assert undisturbed["next", "done"].sum() == len(plan)
    for key in (("observation", "image"), ("observation", "state"), "action", "init_state_id", ("next", "done")):
        assert torch.equal(batch[key], undisturbed[key]), key


def test_every_worker_has_variables_of_its_own(tmp_path: Path) -> None:
    variables = [{"MUJOCO_EGL_DEVICE_ID": "3"}, {"MUJOCO_EGL_DEVICE_ID": "5"}]
    make = partial(VariableEnv, None, tmp_path)
    env = WatchedParallelEnv(2, make, mp_start_method="forkserver", worker_timeout=20.0, worker_variables=variables)
    try:
        assert env.reset()["total"].tolist() == [[3.0], [5.0]]
        env._workers[1].kill()
        env._workers[1].join()
        assert env.reset()["total"].tolist() == [[3.0], [5.0]]
    finally:
        env.close()
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ
    with pytest.raises(ValueError, match="one per worker, got 1 for 2"):
        WatchedParallelEnv(2, make, worker_variables=variables[:1])


def test_what_was_interrupted_is_not_taken_for_the_next_answer(
    watched: Callable[..., WatchedParallelEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = watched(num_envs=None)
    state = env.reset()
    process = env._workers[0].pid
    os.kill(process, signal.SIGSTOP)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(watchdog, "wait", interrupt)
        env.step(act(state))
    threading.Timer(0.5, go_on, (process,)).start()  # with the step, after the reset has been sent
    state = env.reset()
    assert state["time"].tolist() == [[0], [0]]
    for step in (1, 2):
        state = env.step(act(state))["next"]
        assert state["time"].tolist() == [[step], [step]]


def test_an_interrupted_start_is_made_up_for(
    watched: Callable[..., WatchedParallelEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = watched(num_envs=None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(watchdog, "wait", interrupt)
        env.reset()
    state = env.reset()
    assert state["time"].tolist() == [[0], [0]]
    assert env.step(act(state))["next", "time"].tolist() == [[1], [1]]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def go_on(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)


def test_a_death_while_another_worker_is_replaced(
    watched: Callable[..., WatchedParallelEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = watched(num_envs=None)
    env.reset()
    launch = env._launch

    def launch_and_kill(index: int) -> None:
        monkeypatch.undo()
        end(env, 1)
        launch(index)

    monkeypatch.setattr(env, "_launch", launch_and_kill)
    end(env, 0)
    assert env.reset()["time"].tolist() == [[0], [0]]
    env.close()


def end(env: WatchedParallelEnv, worker: int) -> None:
    env._workers[worker].kill()
    env._workers[worker].join()


def test_the_error_of_a_process_that_does_not_end(tmp_path: Path) -> None:
    make = partial(LingeringEnv, None, tmp_path, "value")
    env = WatchedParallelEnv(2, make, mp_start_method="forkserver", worker_timeout=20.0)
    try:
        state = env.reset(TensorDict({"task_id": [[0], [0]], "init_state_id": [[7], [1]]}, [2]))
        with pytest.raises(ValueError, match="the action is not a number"):
            for _ in range(3):
                state = env.step(act(state))["next"]
    finally:
        env.close(raise_if_closed=False)


def test_a_worker_that_ends_while_torchrl_talks_to_it(watched: Callable[..., WatchedParallelEnv]) -> None:
    env = watched(num_envs=None)
    env.reset()
    with pytest.raises(RuntimeError, match="(?s)ended before it answered.*no_such_attribute"):
        env.no_such_attribute()


def test_a_state_dict_is_given_to_workers_that_take_their_time(watched: Callable[..., WatchedParallelEnv]) -> None:
    env = watched(num_envs=None)
    state = env.reset()
    saved = env.state_dict()
    process = env._workers[0].pid
    os.kill(process, signal.SIGSTOP)
    threading.Timer(0.5, go_on, (process,)).start()
    env.load_state_dict(saved)
    # What rang for it is not taken for the step's end.
    assert env.step(act(state))["next", "time"].tolist() == [[1], [1]]


def test_indexing_is_refused(watched: Callable[..., WatchedParallelEnv]) -> None:
    with pytest.raises(TypeError, match="cannot be indexed"):
        watched()[0]
