"""The controller's parts against robosuite's own and against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest

from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.envs.simulation import control
from torchrl_vla.envs.simulation.control import ArmState, Robot
from torchrl_vla.envs.simulation.controller_goals import goal_changes

pytestmark = pytest.mark.simulator


@pytest.fixture(scope="module")
def robosuite_utils():
    configure_rendering()
    from torchrl_vla.envs.installation import import_libero_envs

    import_libero_envs()
    from robosuite.utils import control_utils, transform_utils

    return control_utils, transform_utils


def arm(generator: np.random.Generator) -> tuple[Robot, ArmState]:
    """A random but well-conditioned arm."""
    square = generator.normal(size=(7, 7))
    state = ArmState(
        stale=np.zeros(1, np.int64),
        goal_pos=generator.normal(size=3),
        goal_ori=rotation(generator),
        gripper=np.zeros(2),
        ee_pos=generator.normal(size=3),
        ee_ori=rotation(generator),
        ee_vel=generator.normal(size=6),
        joint_pos=generator.normal(size=7),
        joint_vel=generator.normal(size=7),
        jacobian=generator.normal(size=(7, 6)),
        mass=square @ square.T + 0.5 * np.eye(7),
    )
    robot = Robot(
        *(np.arange(7), np.arange(7), np.arange(7), np.array([7, 8]), np.zeros(1, np.int64)),
        kp=np.full(6, 150.0),
        kd=2 * np.sqrt(np.full(6, 150.0)),
        torque_low=np.full(7, -80.0),
        torque_high=np.full(7, 80.0),
        gripper_bias=np.zeros(2),
        gripper_weight=np.full(2, 0.04),
        posture=generator.normal(size=7),
    )
    return robot, state


def rotation(generator: np.random.Generator) -> np.ndarray:
    orthogonal, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    return np.ascontiguousarray(orthogonal * np.linalg.det(orthogonal))


def robosuite_torques(control_utils, robot: Robot, state: ArmState) -> np.ndarray:
    """``OperationalSpaceController.run_controller`` without gravity, with its own functions."""
    mass, full = np.asfortranarray(state.mass.T), np.asfortranarray(state.jacobian.T)
    pos, ori = np.asfortranarray(full[:3]), np.asfortranarray(full[3:])
    _, inertia_pos, inertia_ori, null_space = control_utils.opspace_matrices(mass, full, pos, ori)
    turn = control_utils.orientation_error(state.goal_ori, state.ee_ori)
    force = (state.goal_pos - state.ee_pos) * robot.kp[:3] - state.ee_vel[:3] * robot.kd[:3]
    torque = turn * robot.kp[3:] - state.ee_vel[3:] * robot.kd[3:]
    wrench = np.concatenate([inertia_pos @ force, inertia_ori @ torque])
    posture = control_utils.nullspace_torques(mass, null_space, robot.posture, state.joint_pos, state.joint_vel)
    return full.T @ wrench + posture


def test_exact_torques_equal_robosuites(robosuite_utils) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        robot, state = arm(generator)
        task, posture = control._torques_exact(robot, state)
        assert np.array_equal(task + posture, robosuite_torques(robosuite_utils[0], robot, state))


def test_fast_torques_are_the_same_but_for_rounding(robosuite_utils) -> None:
    generator = np.random.default_rng(1)
    for _ in range(20):
        robot, state = arm(generator)
        task, posture = control._torques_fast(robot, state)
        np.testing.assert_allclose(task + posture, robosuite_torques(robosuite_utils[0], robot, state), rtol=1e-8)


def test_fast_torques_stay_finite_where_the_arm_has_lost_a_direction() -> None:
    robot, state = arm(np.random.default_rng(2))
    state.jacobian[:, 2] = 0.0
    task, posture = control._torques_fast(robot, state)
    assert np.isfinite(task).all() and np.isfinite(posture).all()


def test_goal_changes_equal_robosuites(robosuite_utils) -> None:
    transform_utils = robosuite_utils[1]
    actions = np.random.default_rng(3).uniform(-1.5, 1.5, (200, 7))
    actions[:50, 3:6] *= 1e-6
    goals = goal_changes(actions)
    assert goals.rotates.all()
    for action, turn in zip(actions, goals.rotation, strict=True):
        expected = transform_utils.quat2mat(transform_utils.axisangle2quat(np.clip(action[3:6], -1, 1) * 0.5))
        assert np.array_equal(turn, expected)


def test_goal_changes_by_hand() -> None:
    goals = goal_changes(np.array([[1.0, -0.5, -3.0, 0.0, 0.0, 0.0, 0.2], [0, 0, 0, 0, 0, -0.5, -4.0]]))
    assert goals.translation.tolist() == [[0.05, -0.025, -0.05], [0.0, 0.0, 0.0]]
    assert goals.rotates.tolist() == [False, True] and goals.gripper.tolist() == [1.0, -1.0]
    # Half of the largest rotation of 0.5 rad, clockwise about z.
    cosine, sine = np.cos(0.25), np.sin(0.25)
    np.testing.assert_allclose(goals.rotation[1], [[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]], atol=1e-7)


def test_a_zero_rotation_keeps_the_earlier_goal_orientation() -> None:
    _, state = arm(np.random.default_rng(4))
    before = state.goal_ori.copy()
    control._set_goal(state, np.array([0.01, 0.02, 0.03]), np.eye(3), False)
    assert np.array_equal(state.goal_ori, before)
    assert np.array_equal(state.goal_pos, state.ee_pos + [0.01, 0.02, 0.03])
    control._set_goal(state, np.zeros(3), np.eye(3), True)
    assert np.array_equal(state.goal_ori, state.ee_ori)


def test_observations_are_sampled_when_robosuite_samples(robosuite_utils) -> None:
    """Against an ``Observable`` of robosuite's, updated by a reset, an initial state and 1000 control steps."""
    from robosuite.utils.observables import Observable, sensor

    samples = []

    @sensor(modality="test")
    def count(_: dict) -> int:
        samples.append(None)
        return 0

    observable = Observable("count", count, sampling_rate=20)
    for _ in range(2):
        observable.update(0.002, {}, force=True)
    substeps = []
    for substep in range(1000 * control.SUBSTEPS):
        before = len(samples)
        observable.update(0.002, {})
        if len(samples) > before:
            substeps.append(substep)
    assert substeps == [control.SUBSTEPS * step + control._SAMPLED_SUBSTEP for step in range(1000)]
