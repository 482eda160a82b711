"""The scripted expert: its geometry by hand-computed cases, and that it solves tasks of the real simulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from torchrl_vla.demonstrations.expert.arm import GRIPPER_CLOSE, GRIPPER_OPEN, Arm
from torchrl_vla.demonstrations.expert.expert import ScriptedExpert
from torchrl_vla.demonstrations.expert.geometry import (
    CollisionPoints,
    minimum_area_rectangle,
    rotation_about,
    rotation_vector,
)
from torchrl_vla.demonstrations.expert.grasps import plan_grasp
from torchrl_vla.demonstrations.expert.perturbation import Perturbation
from torchrl_vla.demonstrations.expert.placement import CarryPath, clear_height, plan_carry, release_height
from torchrl_vla.demonstrations.expert.task_goals import Goal, UnreachableGoalError, read_goals
from torchrl_vla.demonstrations.expert.trials import ExpertEpisode, evaluate_expert, run_episode, success_table
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.envs.tasks import get_suite

pytestmark = pytest.mark.simulator

ON_PLATE = Goal("on", "akita_black_bowl_1", "plate_1")


@pytest.fixture(scope="module")
def simulator() -> Iterator[LiberoSimulator]:
    simulator = LiberoSimulator("libero_spatial", image_size=64)
    yield simulator
    simulator.close()


class Recorder:
    """Passes actions on to a simulator and keeps them."""

    def __init__(self, simulator: LiberoSimulator) -> None:
        self.model, self.data, self._step = simulator.model, simulator.data, simulator.step
        self.actions: list[np.ndarray] = []

    def step(self, slot: int, actions: np.ndarray) -> tuple[int, bool]:
        self.actions.extend(actions)
        return self._step(slot, actions)


def test_goals_are_read_from_the_definition(tmp_path: Path) -> None:
    task = get_suite("libero_object").task(0)
    assert read_goals(task.bddl_file) == (Goal("in", "alphabet_soup_1", "basket_1_contain_region"),)
    several = tmp_path / "several.bddl"
    several.write_text("(:init (On a b))\n (:goal\n (And (On a_1 b_1) (Open c_1)\n (In d_1 e_1)))\n)")
    assert read_goals(several) == (Goal("on", "a_1", "b_1"), Goal("open", "c_1"), Goal("in", "d_1", "e_1"))
    several.write_text("(:init (On a b))")
    with pytest.raises(ValueError, match="states no goal"):
        read_goals(several)


def test_unreachable_goals_are_refused(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 0, 0)
    model = simulator.model(0)
    with pytest.raises(UnreachableGoalError, match="kind up: it knows on, in, open"):
        ScriptedExpert(model, [Goal("up", "akita_black_bowl_1")])
    with pytest.raises(UnreachableGoalError, match="'plate_1' that slides or turns"):
        ScriptedExpert(model, [Goal("open", "plate_1")])
    with pytest.raises(UnreachableGoalError, match="'teapot_1'"):
        ScriptedExpert(model, [Goal("on", "teapot_1", "plate_1")])
    with pytest.raises(UnreachableGoalError, match="'shelf_1'"):
        ScriptedExpert(model, [Goal("on", "akita_black_bowl_1", "shelf_1")])
    with pytest.raises(ValueError, match="empty"):
        ScriptedExpert(model, [])
    with pytest.raises(RuntimeError, match="reset"):
        ScriptedExpert(model, [ON_PLATE]).action()


def test_rotations() -> None:
    quarter = rotation_about(np.array([0.0, 0.0, 1.0]), np.pi / 2)
    np.testing.assert_allclose(quarter @ [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], atol=1e-12)
    axis = np.array([2.0, -1.0, 2.0]) / 3
    np.testing.assert_allclose(rotation_vector(rotation_about(axis, 0.7)), 0.7 * axis, atol=1e-9)
    np.testing.assert_allclose(rotation_vector(rotation_about(axis, -0.7)), -0.7 * axis, atol=1e-9)


def test_minimum_area_rectangle_of_a_turned_box() -> None:
    corners = np.array([[4.0, 1.0], [4.0, -1.0], [-4.0, 1.0], [-4.0, -1.0], [0.5, 0.2], [-1.0, 0.0]])
    turn = rotation_about(np.array([0.0, 0.0, 1.0]), 0.4)[:2, :2]
    centre, direction, long_half, short_half = minimum_area_rectangle(corners @ turn.T + [10.0, 20.0])
    np.testing.assert_allclose(centre, [10.0, 20.0], atol=1e-9)
    assert (long_half, short_half) == pytest.approx((4.0, 1.0))
    assert np.remainder(direction - 0.4 + 0.1, np.pi) == pytest.approx(0.1)


def test_collision_points_know_the_table_the_objects_and_nothing_of_the_robot(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 0, 0)
    model, data = simulator.model(0), simulator.data(0)
    surfaces = CollisionPoints(model)
    assert surfaces.ground(data) == pytest.approx(0.9, abs=1e-6)
    bowl = model.body("akita_black_bowl_1_main").id
    own, others = surfaces.split(data, bowl)
    # A bowl some 11 cm wide and 6 cm high, standing on the table.
    extent = own.max(axis=0) - own.min(axis=0)
    assert np.all((extent[:2] > 0.09) & (extent[:2] < 0.13)) and 0.04 < extent[2] < 0.07
    assert own[:, 2].min() == pytest.approx(0.9, abs=0.003)
    # Cabinet and stove are the tallest; the arm, far above, is not among the others.
    assert 1.1 < others[:, 2].max() < 1.2


def test_the_hand_tilts_no_more_than_reach_demands(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 0, 0)
    arm, data = Arm(simulator.model(0)), simulator.data(0)
    shoulder = data.body("robot0_link0").xpos + [0.0, 0.0, 0.333]

    def wrist_distance(position: np.ndarray, tilt: float) -> float:
        down = np.array([np.sin(tilt), 0.0, -np.cos(tilt)])
        outward = np.array([np.cos(tilt), 0.0, np.sin(tilt)])
        return float(np.linalg.norm(position - 0.21 * down - 0.088 * outward - shoulder))

    near, far = shoulder + [0.5, 0.0, -0.3], shoulder + [0.78, 0.0, -0.3]
    np.testing.assert_array_equal(arm.reach_tilt(data, np.stack([near, far]))[0], 0.0)
    tilt = float(arm.reach_tilt(data, far))
    assert wrist_distance(far, tilt) <= 0.645 < wrist_distance(far, tilt - np.radians(2.0))
    rotation = arm.hand_rotation(0.0, np.pi / 2, tilt)
    np.testing.assert_allclose(rotation[:, 2], [np.sin(tilt), 0.0, -np.cos(tilt)], atol=1e-12)
    np.testing.assert_allclose(rotation[:, 0], [0.0, 1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0)


def test_actions_keep_their_direction_when_they_saturate(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 0, 0)
    arm, data = Arm(simulator.model(0)), simulator.data(0)
    position, rotation = arm.pose(data)
    action = arm.towards(data, position + [0.2, -0.1, 0.0], rotation, GRIPPER_CLOSE, speed=0.8)
    np.testing.assert_allclose(action[:3], [0.8, -0.4, 0.0], atol=0.02)
    np.testing.assert_allclose(action[3:], [0.0, 0.0, 0.0, 1.0], atol=1e-6)
    turned = rotation_about(np.array([0.0, 0.0, 1.0]), 0.1) @ rotation
    action = arm.towards(data, position + [0.005, 0.0, 0.0], turned, GRIPPER_OPEN)
    # 2.0 of 5 mm of 5 cm, less what the settled arm still moves; 1.5 of 0.1 of 0.5 rad.
    np.testing.assert_allclose(action, [0.2, 0.0, 0.0, 0.0, 0.0, 0.3, -1.0], atol=0.02)


def test_a_bowl_is_grasped_at_its_rim_away_from_walls(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 0, 0)
    model, data = simulator.model(0), simulator.data(0)
    arm, surfaces = Arm(model), CollisionPoints(model)
    bowl = model.body("akita_black_bowl_1_main").id
    points, others = surfaces.split(data, bowl)
    grasp = plan_grasp(arm, data, points, others, approach=0.07, carry=np.zeros(3))
    outward = grasp.position[:2] - data.xpos[bowl, :2]
    assert 0.03 < np.linalg.norm(outward) < 0.06
    assert points[:, 2].max() - grasp.position[2] == pytest.approx(0.022, abs=1e-3)
    fingers = grasp.rotation[:2, 0] / np.linalg.norm(grasp.rotation[:2, 0])
    assert abs(fingers @ outward) / np.linalg.norm(outward) > 0.98
    # A wall just outside that place of the rim moves the grasp elsewhere.
    direction = outward / np.linalg.norm(outward)
    across, height = np.meshgrid(np.linspace(-0.05, 0.05, 21), np.linspace(0.9, 1.05, 31))
    side = np.outer(across.ravel(), [-direction[1], direction[0]])
    wall = np.column_stack([data.xpos[bowl, :2] + 0.075 * direction + side, height.ravel()])
    obstructed = np.concatenate([others, wall])
    other = plan_grasp(arm, data, points, obstructed, approach=0.07, carry=np.zeros(3))
    assert np.linalg.norm(other.position - grasp.position) > 0.02
    # So does its failure.
    other = plan_grasp(arm, data, points, others, approach=0.07, carry=np.zeros(3), avoid=[grasp.position])
    assert np.linalg.norm(other.position - grasp.position) >= 0.02


def test_heights_of_carrying_and_releasing() -> None:
    # An object 4 cm high whose origin is 1 cm above its bottom, and a wall 20 cm tall half-way of 40 cm.
    box = np.array([[x, y, z] for x in (-0.02, 0.02) for y in (-0.02, 0.02) for z in (0.0, 0.04)])
    origin, target = np.array([0.0, 0.0, 0.01]), np.array([0.4, 0.0])
    wall = np.array([[0.2, 0.0, 0.2], [0.2, 0.5, 0.9]])
    path = plan_carry(box, origin, wall, target, ground=0.0, lowest=0.0)
    reach = np.hypot(0.02, 0.02) + 0.015
    assert path.height(0.2) == path.height(0.2 - reach) == pytest.approx(0.2 + 0.025 + 0.01)
    assert path.height(0.2 + reach + 1e-6) == pytest.approx(0.025 + 0.01)
    # From 5 cm further back than the 3 cm of look-ahead, 0.7 of these 5 cm are left to climb.
    assert path.height(0.2 - reach - 0.08) == pytest.approx(0.235 - 0.7 * 0.05)
    # At 45 degrees it would be 15.7 cm higher where the wall begins to matter, and 3.7 cm where that is 12 cm nearer.
    for moved, rise_first in (([0, 0, 0], True), ([0, 0, -0.08], False), ([-0.12, 0, -0.15], True)):
        lower = plan_carry(box, origin, wall + moved, target, ground=0.0, lowest=0.0)
        assert lower.rise_first == rise_first, moved
    assert isinstance(path, CarryPath)
    assert release_height(box, origin, wall, target, ground=0.3) == pytest.approx(0.3 + 0.01 + 0.008)
    plate = np.array([[0.41, 0.01, 0.33], [0.4, 0.06, 0.5]])
    assert release_height(box, origin, plate, target, ground=0.3) == pytest.approx(0.33 + 0.01 + 0.008)


def test_the_empty_hand_passes_over_what_stands_in_its_way() -> None:
    start, end = np.array([0.0, 0.0, 0.5]), np.array([0.4, 0.0, 0.3])
    # Half-way the hand would be 40 cm high: 3 cm over one wall, beside another, into a third.
    assert clear_height(start, end, np.array([[0.2, 0.0, 0.37], [0.2, 0.08, 0.9], [0.5, 0.0, 0.9]])) == -np.inf
    assert clear_height(start, end, np.array([[0.2, 0.06, 0.38], [0.1, 0.0, 0.2]])) == pytest.approx(0.38 + 0.025)


def test_the_ground_is_the_table_top_whichever_way_its_box_is_turned() -> None:
    """Tables of the kitchen, the living room and the study, the latter two of boxes that stand on their sides."""
    for suite, task_id, height in (("libero_goal", 8, 0.9), ("libero_10", 4, 0.437), ("libero_10", 5, 0.885)):
        simulator = LiberoSimulator(suite, fidelity="fast")
        simulator.reset(0, task_id, 0)
        assert CollisionPoints(simulator.model(0)).ground(simulator.data(0)) == pytest.approx(height, abs=1e-3)
        simulator.close()


@pytest.mark.parametrize(
    ("suite", "task_id", "state_id"),
    [("libero_10", 4, 0), ("libero_10", 0, 2), ("libero_10", 7, 0), ("libero_90", 63, 0)],
)
def test_it_solves_tasks_with_two_objects(suite: str, task_id: int, state_id: int) -> None:
    """Mugs put down upright, a can lifted over a basket's wall, a basket left standing, a bowl on a moved one."""
    (episode,) = evaluate_expert(suite, [task_id], [state_id], fidelity="fast")
    assert episode.success and episode.num_steps < 250


def test_it_solves_a_task_the_same_way_each_time(simulator: LiberoSimulator) -> None:
    """From a state that was just simulated and from the same one restored; with actions that a policy could take."""
    runs = []
    for _ in range(2):
        simulator.reset(0, 2, 3)
        recorder = Recorder(simulator)
        expert = ScriptedExpert(simulator.model(0), [ON_PLATE])
        success, steps = run_episode(recorder, expert, max_steps=100)
        assert success and steps == len(recorder.actions) < 90
        runs.append(np.stack(recorder.actions))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert runs[0].shape[1:] == (7,) and np.abs(runs[0]).max() <= 1.0
    gripper = runs[0][:, 6]
    # The fingers close once, and open again unless the bowl meets the plate, and the goal, before.
    assert gripper[0] == GRIPPER_OPEN and set(gripper) == {GRIPPER_OPEN, GRIPPER_CLOSE}
    assert np.count_nonzero(np.diff(gripper)) <= 2


def test_it_recovers_from_a_lost_object(simulator: LiberoSimulator) -> None:
    """The gripper is forced open in mid-air: the bowl falls, is grasped anew and reaches the plate."""
    simulator.reset(0, 2, 3)
    expert = ScriptedExpert(simulator.model(0), [ON_PLATE])
    steps = 0

    def drop(action: np.ndarray) -> np.ndarray:
        nonlocal steps
        steps += 1
        return np.concatenate([action[:6], [GRIPPER_OPEN if 48 <= steps < 54 else action[6]]])

    success, total = run_episode(simulator, expert, max_steps=220, perturb=drop)
    assert success and total > 90


def test_evaluation_in_a_container_and_perturbed() -> None:
    episodes = evaluate_expert("libero_object", [3], [0])
    episodes += evaluate_expert("libero_spatial", [0], [1], perturbed=True, fidelity="fast")
    assert [episode[:3] for episode in episodes] == [(3, 0, True), (0, 1, True)]
    assert all(50 < episode.num_steps < 130 for episode in episodes)


def test_success_table() -> None:
    table = success_table(
        [ExpertEpisode(1, 0, True, 80), ExpertEpisode(1, 4, False, 220), ExpertEpisode(2, 0, False, 9)]
    )
    assert table.splitlines()[2:] == ["| 1 | 1/2 | 80.0 | 80 | 4 |", "| 2 | 0/1 | - | - | 0 |"]


def test_perturbations_are_constant_pushes_of_a_few_steps() -> None:
    action = np.array([0.0, 0.1, -0.1, 0.0, 0.05, 0.0, GRIPPER_CLOSE])
    executed = np.stack([Perturbation(7)(action) for _ in range(2)])
    np.testing.assert_array_equal(executed[0], executed[1])
    perturb = Perturbation([1, 2], push_probability=0.05)
    biases = np.stack([perturb(action) for _ in range(4000)]) - action
    assert np.all(biases[:, 6] == 0)
    pushed = biases[:, :6].any(axis=1)
    starts = np.flatnonzero(pushed & (np.abs(np.diff(biases[:, :6], axis=0, prepend=0)).max(axis=1) > 1e-9))
    lengths = [
        int(np.argmax(np.abs(biases[start:, :6] - biases[start, :6]).max(axis=1) > 1e-9)) for start in starts[:-1]
    ]
    assert min(lengths) == 4 and max(lengths) == 10
    # A step without a push starts one with probability 0.05, and then lasts 7 on average.
    assert pushed.mean() == pytest.approx(7 / (7 + 19), abs=0.06)
    deviations = biases[starts, :6].std(axis=0)
    assert np.all(np.abs(deviations[:3] - 0.35) < 0.1) and np.all(np.abs(deviations[3:] - 0.12) < 0.04)
    still = Perturbation(0, push_probability=0.0)
    np.testing.assert_array_equal(still(action), action)
    tremble = Perturbation(0, push_probability=0.0, noise=0.1)
    trembling = np.array([tremble(np.zeros(7)) for _ in range(2000)])
    assert trembling[:, :6].std() == pytest.approx(0.1, rel=0.05) and not trembling[:, 6].any()
    with pytest.raises(ValueError, match="push_probability=1.5"):
        Perturbation(0, push_probability=1.5)
    with pytest.raises(ValueError, match="noise=-1"):
        Perturbation(0, noise=-1.0)
