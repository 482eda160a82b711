"""What lies still is left out of fast physics, and nothing that matters is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mujoco
import numpy as np
import pytest
from reference import changed_start, smooth_actions

from torchrl_vla.envs.simulation.simulator import LiberoSimulator

pytestmark = pytest.mark.simulator

WAIT = np.array([[0, 0, 0, 0, 0, 0, -1.0]])


@pytest.fixture(scope="module")
def simulator() -> Iterator[LiberoSimulator]:
    simulator = LiberoSimulator("libero_spatial", num_slots=2, image_size=16, fidelity="fast")
    yield simulator
    simulator.close()


def asleep(simulator: LiberoSimulator, name: str) -> bool:
    held = simulator._slots[0]
    assert held is not None
    model = simulator.model(0)
    return bool(held.sleep.asleep[model.body_treeid[model.body(name).id]])


def test_what_rests_sleeps_in_its_place(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 0, 0)
    model, data = simulator.model(0), simulator.data(0)
    simulator.step(0, np.repeat(WAIT, 8, axis=0))
    held = simulator._slots[0]
    assert held is not None
    # The robot and no other of ten trees is awake, and nothing touches anything.
    assert held.sleep.asleep.tolist() == [0] + [1] * 9 and data.ncon == 0
    robot = held.task.trees.qpos[0]
    before = data.qpos.copy()
    simulator.step(0, np.repeat(WAIT, 3, axis=0))
    others = np.delete(np.arange(model.nq), np.arange(*robot))
    assert np.array_equal(data.qpos[others], before[others]) and (data.qvel[model.dof_treeid > 0] == 0).all()
    assert not np.array_equal(data.qpos, before)


def test_a_restored_episode_sleeps_as_the_simulated_one(simulator: LiberoSimulator) -> None:
    actions = smooth_actions(30, 3)
    fresh = LiberoSimulator("libero_spatial", image_size=16, fidelity="fast")
    # In the first slot another episode ran, in which all slept elsewhere.
    simulator.reset(0, 0, 0)
    simulator.step(0, np.repeat(WAIT, 8, axis=0))
    ends = []
    for one, slot in ((simulator, 0), (simulator, 0), (simulator, 1), (fresh, 0)):
        one.reset(slot, 5, 3)
        one.step(slot, actions)
        ends.append(one.data(slot).qpos.copy())
    fresh.close()
    for end in ends[1:]:
        assert np.array_equal(end, ends[0])


def test_others_of_the_same_model_do_not_notice(simulator: LiberoSimulator) -> None:
    actions = smooth_actions(6, 1)
    exact = LiberoSimulator("libero_spatial", image_size=16)
    ends = []
    for between in (lambda: None, lambda: simulator.step(0, WAIT)):
        simulator.reset(0, 0, 0)
        exact.reset(0, 0, 0)
        for action in actions:
            exact.step(0, action[None])
            between()
        assert simulator.model(0) is exact.model(0)
        ends.append(exact.data(0).qpos.copy())
    assert np.array_equal(ends[0], ends[1])
    mujoco.mj_forward(exact.model(0), exact.data(0))
    assert exact.data(0).ncon > 50
    exact.close()


def start_from(
    monkeypatch, tmp_path, suite: str, task_id: int, prepare: Callable[[mujoco.MjModel, np.ndarray], None]
) -> dict[str, LiberoSimulator]:
    """Simulators of each fidelity at an initial state that was changed."""
    changed_start(monkeypatch, tmp_path, suite, task_id, prepare)
    simulators = {
        name: LiberoSimulator(suite, image_size=16, settle_steps=0, fidelity=name) for name in ("exact", "fast")
    }
    for simulator in simulators.values():
        simulator.reset(0, 0, 0)
    return simulators


def position(model: mujoco.MjModel, name: str) -> slice:
    start = model.jnt_qposadr[model.body(name).jntadr[0]]
    return slice(start, start + 3)


def test_what_something_falls_on_wakes(monkeypatch, tmp_path) -> None:
    """A bowl falls for 0.85 s onto a box of cookies, which has been put to sleep meanwhile."""

    def prepare(model: mujoco.MjModel, state: np.ndarray) -> None:
        bowl, cookies = position(model, "akita_black_bowl_1_main"), position(model, "cookies_1_main")
        state[1:][bowl] = state[1:][cookies] + [0.0, 0.01, 2.0]

    simulators = start_from(monkeypatch, tmp_path, "libero_spatial", 0, prepare)
    fast, exact = simulators["fast"], simulators["exact"]
    place = position(fast.model(0), "cookies_1_main")
    for simulator in simulators.values():
        simulator.step(0, np.repeat(WAIT, 15, axis=0))
    assert asleep(fast, "cookies_1_main") and not asleep(fast, "akita_black_bowl_1_main")
    before = fast.data(0).qpos[place].copy()
    for simulator in simulators.values():
        simulator.step(0, np.repeat(WAIT, 3, axis=0))
    assert not asleep(fast, "cookies_1_main")
    moved = np.abs(exact.data(0).qpos[place] - before).max()
    assert moved > 1e-4
    assert np.abs(fast.data(0).qpos - exact.data(0).qpos).max() < 0.05 * moved


def test_contacts_that_the_goal_needs_do_not_sleep(monkeypatch, tmp_path) -> None:
    """A pot stands on the stove; its other half of the goal, the knob, is turned much later."""

    def prepare(model: mujoco.MjModel, state: np.ndarray) -> None:
        pot = position(model, "moka_pot_1_main")
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        state[1:][pot] = data.site("flat_stove_1_cook_region").xpos + [0.0, 0.0, 0.05]

    fast = start_from(monkeypatch, tmp_path, "libero_10", 2, prepare)["fast"]
    for _ in range(5):
        assert fast.step(0, np.repeat(WAIT, 8, axis=0)) == (8, False)
    assert asleep(fast, "chefmate_8_frypan_1_main") and not asleep(fast, "moka_pot_1_main")
    held = fast._slots[0]
    assert held is not None
    knob = held.task.scene.burners[0]
    held.sleep.asleep[:] = 0
    fast.data(0).qpos[list(knob.qpos)] = knob.threshold + 0.05
    assert fast.step(0, WAIT) == (1, True)
