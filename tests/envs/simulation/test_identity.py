"""The simulator gives what stock LIBERO gives, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import mujoco
import numpy as np
import pytest
from reference import CAMERAS, Stock, assert_same, changed_start, random_actions, smooth_actions

from torchrl_vla.demonstrations.expert.expert import ScriptedExpert
from torchrl_vla.demonstrations.expert.task_goals import read_goals
from torchrl_vla.envs.simulation import settled_states
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.envs.tasks import LiberoTask, get_suite

pytestmark = pytest.mark.simulator

SLIM = [("libero_spatial", 0, [0]), ("libero_spatial", 4, [0, 1]), ("libero_goal", 7, [1])]
FULL = [(suite, task) for suite in ("libero_spatial", "libero_goal") for task in range(10)]
FULL += [("libero_object", 0), ("libero_object", 7), ("libero_10", 2), ("libero_10", 9)]
FULL += [("libero_90", 5), ("libero_90", 33), ("libero_90", 50), ("libero_90", 85)]
#: The expert moves objects and opens or turns on nothing.
EXPERT = [("libero_spatial", 0), ("libero_spatial", 4), ("libero_goal", 1), ("libero_goal", 8)]
EXPERT += [("libero_object", 0), ("libero_object", 7), ("libero_10", 0), ("libero_10", 7)]
EXPERT += [("libero_90", 50), ("libero_90", 85)]


@pytest.fixture(autouse=True)
def no_kept_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is simulated and drawn here and now."""
    monkeypatch.setattr(settled_states, "cache_folder", lambda: tmp_path)


def expert_actions(simulator: LiberoSimulator, task: LiberoTask) -> Iterator[np.ndarray]:
    expert = ScriptedExpert(simulator.model(0), read_goals(task.bddl_file))
    expert.reset(simulator.data(0))
    while True:
        yield expert.action()


def compare(
    suite: str,
    task_id: int,
    init_state_ids: list[int],
    *,
    steps: int,
    picture_every: int,
    seed: int = 0,
    by_expert: bool = False,
) -> None:
    """Where the expert acts, it has to succeed within the steps."""
    task = get_suite(suite).task(task_id)
    ours = LiberoSimulator(suite, cameras=CAMERAS, image_size=64, seed=seed)
    stock = Stock(task, seed=seed)
    for init_state_id in init_state_ids:
        stock.draws = False
        stock.start(task.init_states[init_state_id])
        ours.reset(0, task_id, init_state_id)
        assert_same("settled", ours, 0, stock, images=False)
        make = smooth_actions if init_state_id % 2 else random_actions
        actions = islice(expert_actions(ours, task), steps) if by_expert else make(steps, seed=task_id)
        for step, action in enumerate(actions):
            stock.draws = (step + 1) % picture_every == 0
            stock.step(action)
            assert ours.step(0, action[None]) == (1, bool(stock.success))
            stage = f"{suite} task {task_id} from initial state {init_state_id}, step {step}"
            assert_same(stage, ours, 0, stock, images=stock.draws)
            if stock.success:
                break
        assert stock.success or not by_expert
    stock.close()
    ours.close()


@pytest.mark.parametrize(("suite", "task_id", "init_state_ids"), SLIM)
def test_equals_stock(suite: str, task_id: int, init_state_ids: list[int]) -> None:
    compare(suite, task_id, init_state_ids, steps=100 // len(init_state_ids), picture_every=20)


def test_equals_stock_while_the_expert_solves_the_task() -> None:
    compare("libero_object", 0, [0], steps=150, picture_every=20, by_expert=True)


@pytest.mark.full
@pytest.mark.parametrize(("suite", "task_id"), FULL)
def test_equals_stock_in_full(suite: str, task_id: int) -> None:
    compare(suite, task_id, [2, 17, 35], steps=120, picture_every=8, seed=7)


@pytest.mark.full
@pytest.mark.parametrize(("suite", "task_id"), EXPERT)
def test_equals_stock_in_full_while_the_expert_solves_the_task(suite: str, task_id: int) -> None:
    compare(suite, task_id, [2, 17, 35], steps=320, picture_every=8, seed=7, by_expert=True)


@pytest.fixture(scope="module")
def spatial() -> Iterator[LiberoSimulator]:
    simulator = LiberoSimulator("libero_spatial", num_slots=2, cameras=CAMERAS, image_size=64)
    yield simulator
    simulator.close()


def trace(simulator: LiberoSimulator, slot: int, actions: np.ndarray) -> list[np.ndarray]:
    """Everything observable after each chunk of 3 actions."""
    seen = []
    for chunk in actions.reshape(-1, 3, 7):
        simulator.step(slot, chunk)
        data = simulator.data(slot)
        seen += [data.qpos.copy(), data.qvel.copy(), *simulator.low_dim(slot).values()]
        seen += [simulator.render(slot, camera) for camera in CAMERAS]
    return seen


def assert_equal(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other)


def test_interleaved_slots_of_two_tasks_equal_each_alone(spatial: LiberoSimulator) -> None:
    episodes = [(4, 3, random_actions(12, 1)), (9, 5, smooth_actions(12, 2))]
    alone = []
    for task_id, init_state_id, actions in episodes:
        spatial.reset(0, task_id, init_state_id)
        alone.append(trace(spatial, 0, actions))
    for slot, (task_id, init_state_id, _) in enumerate(episodes):
        spatial.reset(slot, task_id, init_state_id)
    interleaved: list[list[np.ndarray]] = [[], []]
    for start in range(0, 12, 3):
        for slot, (_, _, actions) in enumerate(episodes):
            interleaved[slot] += trace(spatial, slot, actions[start : start + 3])
    for one, other in zip(alone, interleaved, strict=True):
        assert_equal(one, other)


def test_a_slot_reused_for_another_task_equals_a_new_one(spatial: LiberoSimulator) -> None:
    actions = random_actions(9, 3)
    spatial.reset(0, 1, 0)
    expected = trace(spatial, 0, actions)
    spatial.reset(1, 6, 2)
    trace(spatial, 1, smooth_actions(9, 4))
    spatial.reset(1, 1, 0)
    assert_equal(trace(spatial, 1, actions), expected)


def falling_bowl(model: mujoco.MjModel, state: np.ndarray) -> None:
    """The bowl starts above the plate and succeeds when it lands."""
    joints = [model.body(f"{name}_main").jntadr[0] for name in ("akita_black_bowl_1", "plate_1")]
    bowl, plate = model.jnt_qposadr[joints]
    state[1 + bowl : 4 + bowl] = state[1 + plate : 4 + plate] + [0.0, 0.0, 0.12]


def turning_knob(model: mujoco.MjModel, state: np.ndarray) -> None:
    """The stove's knob turns by itself; the burner, drawn from then on, must show when stock's does."""
    [knob] = [joint for joint in range(model.njnt) if "flat_stove" in model.joint(joint).name]
    state[1 + model.jnt_qposadr[knob]] = 0.3
    state[1 + model.nq + model.jnt_dofadr[knob]] = 4.0


@pytest.mark.parametrize(
    ("suite", "task_id", "prepare"), [("libero_spatial", 0, falling_bowl), ("libero_goal", 7, turning_knob)]
)
def test_a_chunk_ended_by_success_equals_stock(suite, task_id, prepare, tmp_path, monkeypatch) -> None:
    changed = changed_start(monkeypatch, tmp_path, suite, task_id, prepare)
    ours = LiberoSimulator(suite, cameras=CAMERAS, image_size=64, settle_steps=0)
    ours.reset(0, 0, 0)
    stock = Stock(changed)
    stock.start(changed.init_states[0], settle_steps=0)
    assert_same("initial state", ours, 0, stock, images=True)
    actions = random_actions(12, 0)
    steps, success = ours.step(0, actions)
    assert success and 1 < steps < 12
    for action in actions[:steps]:
        assert not stock.success
        stock.step(action)
    assert stock.success and stock.reward == 1.0
    assert_same("success", ours, 0, stock, images=True)
    stock.step(actions[steps])
    ours.step(0, actions[steps : steps + 1])
    assert_same("after success", ours, 0, stock, images=True)
    stock.close()
