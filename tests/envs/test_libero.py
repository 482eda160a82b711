"""LiberoEnv in one process, on the real simulator."""

import inspect
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_vla.envs import LiberoEnv, get_suite
from torchrl_vla.envs.proprio import quaternion_state

pytestmark = pytest.mark.simulator

SIZE = 24
DOWN = torch.tensor([0.0, 0.0, -0.3, 0.0, 0.0, 0.0, -1.0])


@pytest.fixture(scope="module")
def pair() -> Iterator[LiberoEnv]:
    """Two slots, tasks 0 and 1 in turn, horizon of 20 control steps."""
    env = LiberoEnv(task_ids=[0, 1], num_envs=2, image_size=SIZE, max_episode_steps=20, reward_scale=2.5)
    yield env
    env.close()


@pytest.fixture(scope="module")
def single() -> Iterator[LiberoEnv]:
    """One slot without batch dimension, one control step per step."""
    env = LiberoEnv(image_size=SIZE, chunk_size=1, max_episode_steps=20)
    yield env
    env.close()


def _step(env: LiberoEnv, tensordict: TensorDict, action: torch.Tensor) -> TensorDict:
    """Steps and returns what lies under ``next``."""
    tensordict.set("action", action.expand(env.action_spec.shape).clone())
    return env.step(tensordict)["next"]


def _place_bowl_above_plate(env: LiberoEnv, slot: int = 0) -> None:
    """Lets the bowl of task 0 hang over the plate, so that it falls onto it, which is the goal."""
    data = env._simulator.data(slot)
    bowl, plate = (data.joint(f"{name}_1_joint0") for name in ("akita_black_bowl", "plate"))
    bowl.qpos[:3] = plate.qpos[:3] + [0.0, 0.0, 0.05]
    bowl.qpos[3:] = [1.0, 0.0, 0.0, 0.0]
    bowl.qvel[:] = 0.0


def _time(env: LiberoEnv, slot: int) -> float:
    return env._simulator.data(slot).time


def test_entries_of_reset_and_step(pair: LiberoEnv) -> None:
    start = pair.reset(task_id=[0, 1], init_state_id=3)
    after = _step(pair, start.clone(), DOWN)
    for tensordict, control_steps in ((start, 0), (after, 8)):
        image, state = tensordict["observation", "image"], tensordict["observation", "state"]
        assert (image.shape, image.dtype, state.shape, state.dtype) == (
            (2, 3, SIZE, SIZE),
            torch.uint8,
            (2, 8),
            torch.float32,
        )
        assert tensordict["task_id"].tolist() == [[0], [1]] and tensordict["init_state_id"].tolist() == [[3], [3]]
        assert tensordict["num_control_steps"].tolist() == [[control_steps]] * 2
        assert not any(tensordict[key].any() for key in ("success", "done", "terminated", "truncated"))
        for slot in (0, 1):
            text = tensordict[slot]["language_instruction"]
            assert text == get_suite("libero_spatial").tasks[slot].instruction
    assert after["reward"].tolist() == [[0.0], [0.0]] and after["reward"].dtype == torch.float32
    assert (after["observation", "state"][:, 2] < start["observation", "state"][:, 2] - 0.005).all()


def test_single_environment_has_no_batch_dimension(single: LiberoEnv) -> None:
    start = single.reset(init_state_id=0)
    assert start.batch_size == () and start["observation", "image"].shape == (3, SIZE, SIZE)
    assert start["task_id"].shape == (1,) and single.action_spec.shape == (7,)
    assert start["language_instruction"] == get_suite("libero_spatial").tasks[0].instruction


def test_images_are_upright_and_channels_first(pair: LiberoEnv) -> None:
    image = pair.reset(task_id=[0, 1], init_state_id=3)["observation", "image"]
    for slot in (0, 1):
        raw = pair._simulator.render(slot, "agentview")
        assert np.array_equal(image[slot].permute(1, 2, 0).numpy(), np.rot90(raw, 2))


def test_a_chunk_is_its_control_steps_one_by_one(pair: LiberoEnv, single: LiberoEnv) -> None:
    actions = torch.rand(8, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    chunked = _step(pair, pair.reset(task_id=0, init_state_id=5), actions)
    tensordict = single.reset(task_id=0, init_state_id=5)
    for action in actions:
        tensordict = _step(single, tensordict, action)
        assert tensordict["num_control_steps"].item() == 1
    for key in ("state", "image"):
        assert torch.equal(chunked["observation", key][0], tensordict["observation", key])
        assert torch.equal(chunked["observation", key][1], tensordict["observation", key])


def test_success_inside_a_chunk_ends_it_with_its_reward(pair: LiberoEnv, single: LiberoEnv) -> None:
    needed, _ = _steps_until_done(single)
    assert 1 < needed < 8
    tensordict = pair.reset(task_id=0, init_state_id=0)
    _place_bowl_above_plate(pair, slot=0)
    began = _time(pair, 0)
    after = _step(pair, tensordict, torch.zeros(8, 7))
    assert after["num_control_steps"].tolist() == [[needed], [8]]
    assert _time(pair, 0) - began == pytest.approx(0.05 * needed)
    assert after["reward"].tolist() == [[2.5], [0.0]]
    for key in ("success", "terminated", "done"):
        assert after[key].tolist() == [[True], [False]]
    assert not after["truncated"].any()

    # The slot that is done waits at no cost and gives its last observation; the other goes on.
    waited = _time(pair, 0)
    later = _step(pair, after.clone(), torch.zeros(8, 7))
    assert _time(pair, 0) == waited and _time(pair, 1) - began == pytest.approx(0.05 * 16)
    assert later["num_control_steps"].tolist() == [[0], [8]] and later["reward"].tolist() == [[0.0], [0.0]]
    assert later["done"].tolist() == [[True], [False]] and later["success"].tolist() == [[True], [False]]
    assert torch.equal(later["observation", "image"][0], after["observation", "image"][0])


def test_the_last_chunk_is_cut_at_the_horizon(pair: LiberoEnv) -> None:
    tensordict = pair.reset(task_id=[0, 1])
    began = _time(pair, 1)
    counts = []
    for _ in range(4):
        tensordict = _step(pair, tensordict, DOWN)
        counts.append(tensordict["num_control_steps"].flatten().tolist())
        done = len(counts) >= 3
        assert tensordict["truncated"].all() == tensordict["done"].all() == done
        assert not tensordict["terminated"].any() and not tensordict["reward"].any()
    assert counts == [[8, 8], [8, 8], [4, 4], [0, 0]]
    assert _time(pair, 1) - began == pytest.approx(1.0)


def _steps_until_done(env: LiberoEnv) -> tuple[int, TensorDict]:
    tensordict = env.reset(task_id=0, init_state_id=0)
    _place_bowl_above_plate(env)
    for count in range(1, 9):
        tensordict = _step(env, tensordict, torch.zeros(7))
        if tensordict["done"].item():
            return count, tensordict
    raise AssertionError("The bowl did not reach the plate.")


def test_success_at_the_horizon_is_no_truncation(single: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, _ = _steps_until_done(single)
    monkeypatch.setattr(single, "max_episode_steps", needed)
    count, end = _steps_until_done(single)
    assert (count, end["terminated"].item(), end["truncated"].item(), end["reward"].item()) == (
        needed,
        True,
        False,
        1.0,
    )
    monkeypatch.setattr(single, "max_episode_steps", needed - 1)
    count, end = _steps_until_done(single)
    assert (count, end["terminated"].item(), end["truncated"].item(), end["reward"].item()) == (
        needed - 1,
        False,
        True,
        0.0,
    )


def test_a_step_mask_leaves_slots_out(pair: LiberoEnv) -> None:
    tensordict = pair.reset(task_id=[0, 1])
    tensordict["_step"] = torch.tensor([False, True])
    time = _time(pair, 0)
    after = _step(pair, tensordict, DOWN)
    assert after["num_control_steps"].tolist() == [[0], [8]] and _time(pair, 0) == time
    assert torch.equal(after["observation", "state"][0], tensordict["observation", "state"][0])
    assert not torch.equal(after["observation", "state"][1], tensordict["observation", "state"][1])


def test_partial_reset_leaves_the_other_slot_alone(pair: LiberoEnv) -> None:
    after = _step(pair, pair.reset(task_id=[0, 1], init_state_id=[2, 2]), DOWN)
    time = _time(pair, 0)
    request = TensorDict({"_reset": torch.tensor([[False], [True]])}, batch_size=[2])
    request.update(after.select("done", "terminated", "truncated", "observation", "task_id", "init_state_id").clone())
    request["task_id"][1], request["init_state_id"][1] = 4, 9
    again = pair.reset(request)
    assert again["task_id"].tolist() == [[0], [4]] and again["init_state_id"].tolist() == [[2], [9]]
    assert torch.equal(again["observation", "state"][0], after["observation", "state"][0])
    assert not torch.equal(again["observation", "image"][1], after["observation", "image"][1])
    later = _step(pair, again, DOWN)
    assert _time(pair, 0) - time == pytest.approx(0.4)
    assert later["task_id"].tolist() == [[0], [4]] and later["init_state_id"].tolist() == [[2], [9]]
    assert later[1]["language_instruction"] == get_suite("libero_spatial").tasks[4].instruction


def test_partial_reset_merges_as_torchrl_does(pair: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[TensorDict, TensorDict]:
        after = _step(pair, pair.reset(task_id=[0, 1], init_state_id=[2, 2]), DOWN).exclude("reward")
        after["memory"] = torch.tensor([[1.0], [2.0]])
        after["_reset"] = torch.tensor([[False], [True]])
        return after, pair.reset(after)

    request, merged = run()
    assert merged is request
    assert merged["num_control_steps"].tolist() == [[8], [0]]
    monkeypatch.delattr(LiberoEnv, "_reset_proc_data")
    _, expected = run()
    assert set(merged.keys(True, True)) == set(expected.keys(True, True))
    for key, value in expected.items(True, True):
        assert torch.equal(merged[key], value), key


@pytest.mark.parametrize(
    "reset",
    [
        lambda env: env.reset(task_id=[3, 5], init_state_id=[7, 8]),
        lambda env: env.reset(task_id=torch.tensor([[3], [5]]), init_state_id=np.array([7, 8])),
        lambda env: env.reset(
            TensorDict({"task_id": torch.tensor([[3], [5]]), "init_state_id": torch.tensor([[7], [8]])}, batch_size=[2])
        ),
        lambda env: env.reset(list_of_kwargs=[{"task_id": 3, "init_state_id": 7}, {"task_id": 5, "init_state_id": 8}]),
        lambda env: env.reset(list_of_kwargs=[{"task_id": 3, "init_state_id": 7}, {"init_state_id": 8}], task_id=5),
    ],
    ids=["lists", "arrays", "tensordict", "list_of_kwargs", "both"],
)
def test_task_and_initial_state_are_chosen_at_reset(pair: LiberoEnv, reset: Callable) -> None:
    tensordict = reset(pair)
    assert tensordict["task_id"].tolist() == [[3], [5]] and tensordict["init_state_id"].tolist() == [[7], [8]]
    reference = pair.reset(task_id=[5, 3], init_state_id=[8, 7])
    assert torch.equal(tensordict["observation", "image"], reference["observation", "image"].flip(0))


def test_what_is_not_chosen_follows_the_schedule() -> None:
    env = LiberoEnv(task_ids=[1, 0], num_envs=3, image_size=SIZE, init_state_id=4)
    first = env.reset()
    assert first["task_id"].flatten().tolist() == [1, 0, 1] and first["init_state_id"].flatten().tolist() == [4, 4, 5]
    # A reset inside a rollout never takes over the last episode's choice.
    rollout = env.rollout(2, policy=None, auto_reset=True)
    assert rollout["task_id"][:, 0].flatten().tolist() == [0, 1, 0]
    env.close()


def test_cameras_and_proprio_format() -> None:
    cameras = ("robot0_eye_in_hand", "agentview", "frontview")
    env = LiberoEnv(image_size=SIZE, cameras=cameras, proprio_format="quaternion")
    observation = env.reset()["observation"]
    assert set(observation.keys()) == {"image", "agentview_image", "frontview_image", "state"}
    for key, camera in zip(("image", "agentview_image", "frontview_image"), cameras, strict=True):
        raw = env._simulator.render(0, camera)
        assert np.array_equal(observation[key].permute(1, 2, 0).numpy(), np.rot90(raw, 2))
    expected = quaternion_state(env._simulator.low_dim(0))
    assert np.array_equal(observation["state"].numpy(), expected.astype(np.float32))
    env.close()
    default = LiberoEnv(image_size=SIZE, cameras=("agentview", "robot0_eye_in_hand"))
    assert set(default.observation_spec["observation"].keys()) == {"image", "wrist_image", "state"}


def test_what_lies_outside_of_the_action_range_is_clipped(single: LiberoEnv) -> None:
    outcomes = []
    for scale in (1.0, 30.0):
        tensordict = single.reset(init_state_id=1)
        for _ in range(3):
            tensordict = _step(single, tensordict, scale * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]))
        outcomes.append(tensordict["observation", "state"])
    assert torch.equal(*outcomes)


def test_bad_actions_name_the_slot_and_change_nothing(pair: LiberoEnv) -> None:
    tensordict = pair.reset(task_id=[0, 1])
    action = torch.zeros(2, 8, 7)
    action[1, 6, 2] = float("nan")
    time = _time(pair, 0)
    with pytest.raises(ValueError, match=r"slot 1 got nan in dimension 2 of control step 6"):
        _step(pair, tensordict, action)
    tensordict["action"] = torch.zeros(2, 7)
    with pytest.raises(ValueError, match=r"takes actions of shape \[2, 8, 7\].*got \[2, 7\]"):
        pair.step(tensordict)
    assert _time(pair, 0) == time
    # Only slots that step need an action.
    tensordict["_step"] = torch.tensor([True, False])
    assert _step(pair, tensordict, action)["num_control_steps"].tolist() == [[8], [0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_suite": "libero_spacial"}, "Did you mean 'libero_spatial'"),
        ({"task_id": 10}, r"task_id=10 is not a task of libero_spatial: it must be in 0\.\.9"),
        ({"task_ids": [0, 0]}, "names a task twice"),
        ({"task_ids": []}, "task_ids is empty"),
        ({"init_state_id": 50}, r"init_state_id=50.*0\.\.49"),
        ({"init_state_mode": "next"}, "cycle, random, fixed, got 'next'"),
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"image_size": -1}, "image_size must be at least 1, got -1"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0"),
        ({"settle_steps": -1}, "settle_steps must not be negative, got -1"),
        ({"reward_scale": 0.0}, "reward_scale must be positive and finite, got 0.0"),
        ({"reward_scale": float("nan")}, "reward_scale"),
        ({"proprio_format": "euler"}, "axis_angle, quaternion, got 'euler'"),
        ({"fidelity": "best"}, "'exact' or 'fast', got 'best'"),
        (
            {"cameras": ("agentview", "wrist")},
            r"agentview, robot0_eye_in_hand, frontview.*got \('agentview', 'wrist'\)",
        ),
        ({"cameras": ()}, "different names"),
        ({"cameras": ("agentview", "agentview")}, "different names"),
        ({"cameras": "agentview"}, "different names"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiberoEnv(**arguments)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"task_id": 10}, "task_id=10 is not a task"),
        ({"init_state_id": [0, 50]}, "init_state_id=50 is not an initial state of task"),
        ({"task_id": [0, 1, 2]}, r"task_id must be an integer, or one per slot \(2\)"),
        ({"task_id": 1.5}, "task_id must be an integer"),
        ({"list_of_kwargs": [{"task_id": 1}]}, r"needs 2 dictionaries"),
        ({"list_of_kwargs": [{"task": 1}, {}]}, "'task_id' and 'init_state_id'"),
    ],
)
def test_bad_requests_at_reset_change_nothing(pair: LiberoEnv, request_: dict, message: str) -> None:
    pair.reset(task_id=[0, 1], init_state_id=0)
    time = _time(pair, 0)
    with pytest.raises(ValueError, match=message):
        pair.reset(**request_)
    assert _time(pair, 0) == time


def test_close_may_be_repeated_and_a_copy_starts_anew(capfd: pytest.CaptureFixture[str]) -> None:
    env = LiberoEnv(image_size=SIZE)
    tensordict = env.reset()
    copy = pickle.loads(pickle.dumps(env))
    with pytest.raises(RuntimeError, match=r"LiberoEnv\(libero_spatial\) has no episode: call reset"):
        _step(copy, tensordict.clone(), DOWN)
    assert torch.equal(copy.reset(init_state_id=0)["observation", "image"], tensordict["observation", "image"])
    copy.close()
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="call reset"):
        _step(env, tensordict.clone(), DOWN)
    assert torch.equal(env.reset(init_state_id=0)["observation", "image"], tensordict["observation", "image"])
    env.close()
    assert capfd.readouterr().err == ""


def test_its_arguments_can_be_looked_up() -> None:
    names = list(inspect.signature(LiberoEnv).parameters)
    assert names[0] == "task_suite" and {"task_id", "num_envs", "fidelity", "chunk_size"} <= set(names)
    assert "self" not in names
