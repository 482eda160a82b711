"""The control loop of one 20 Hz action, compiled: operational-space controller, gripper and 25 physics substeps.

Stock LIBERO runs this loop in Python and evaluates MuJoCo's forward dynamics three times per substep. Here it is one
numba function that calls libmujoco directly and releases the GIL. ``exact`` does everything whose result reaches the
next substep, in stock's order of floating-point operations, so positions and velocities equal stock's to the bit;
``fast`` leaves the redundant work out, and what sleeps.

The controller is Khatib's operational-space control as robosuite 1.4 writes it (``OperationalSpaceController`` with
fixed impedance, position and orientation decoupled): O. Khatib, "A unified approach for motion and force control of
robot manipulators", IEEE Journal on Robotics and Automation 3(1), 1987.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding
import mujoco
import numpy as np
from numba import types

from torchrl_vla.envs.simulation.compiled import compiled

__all__ = ["SUBSTEPS", "ArmState", "DataViews", "Robot", "control_step", "hide_sleeping", "wake"]

#: Physics substeps of 2 ms in one control step of 50 ms.
SUBSTEPS = 25

_ARM_JOINTS = 7
#: Substep after which stock samples its observations: the first of a sampling period, which the reset and the setting
#: of an initial state have shifted by a substep each.
_SAMPLED_SUBSTEP = SUBSTEPS - 2
#: Stiffness of the posture task in the null space of the end effector's.
_POSTURE_KP = 10.0
#: Change of the gripper's target per substep, of a range of [-1, 1].
_GRIPPER_SPEED = 0.01


class Robot(NamedTuple):
    """What the control loop knows of the robot; constant per compiled model.

    Args:
        arm_qpos, arm_qvel, arm_ctrl: ``[7]`` indices of the arm's joints in ``qpos``, ``qvel`` and ``ctrl``.
        gripper_ctrl: ``[2]`` indices of the fingers' actuators.
        site: ``[1]`` index of the grip site, the point that is controlled.
        kp, kd: ``[6]`` stiffness and damping (N/m and Nm/rad; per second).
        torque_low, torque_high: ``[7]`` limits in Nm.
        gripper_bias, gripper_weight: ``[2]`` centre and half-width of the fingers' control range.
        posture: ``[7]`` joint angles that the null space is pulled to, in rad.
    """

    arm_qpos: np.ndarray
    arm_qvel: np.ndarray
    arm_ctrl: np.ndarray
    gripper_ctrl: np.ndarray
    site: np.ndarray
    kp: np.ndarray
    kd: np.ndarray
    torque_low: np.ndarray
    torque_high: np.ndarray
    gripper_bias: np.ndarray
    gripper_weight: np.ndarray
    posture: np.ndarray


class DataViews(NamedTuple):
    """Arrays of an ``mjData``, without a copy.

    Args:
        qpos, qvel, ctrl: state and controls.
        qm: sparse mass matrix.
        bias: ``qfrc_bias``, gravity and Coriolis forces.
        site_xpos, site_xmat: ``[nsite, 3]`` and ``[nsite, 9]`` poses of sites.
        geom_xpos, geom_xmat: ``[ngeom, 3]`` and ``[ngeom, 9]`` poses of geoms.
    """

    qpos: np.ndarray
    qvel: np.ndarray
    ctrl: np.ndarray
    qm: np.ndarray
    bias: np.ndarray
    site_xpos: np.ndarray
    site_xmat: np.ndarray
    geom_xpos: np.ndarray
    geom_xmat: np.ndarray


class ArmState(NamedTuple):
    """What the controller remembers between control steps; one per slot, written in place.

    The kinematics are kept because stock computes the first torque after an initial state is set from those of the pose
    that the reset left: ``stale`` is 1 until then.

    Args:
        stale: ``[1]`` int64.
        goal_pos, goal_ori: ``[3]`` and ``[3, 3]`` target of the grip site in the world.
        gripper: ``[2]`` the fingers' targets in [-1, 1].
        ee_pos, ee_ori: ``[3]`` and ``[3, 3]`` pose of the grip site.
        ee_vel: ``[6]`` its linear and angular velocity.
        joint_pos, joint_vel: ``[7]``.
        jacobian: ``[7, 6]`` the transposed Jacobian, linear columns first.
        mass: ``[7, 7]`` the arm's block of the mass matrix.
    """

    stale: np.ndarray
    goal_pos: np.ndarray
    goal_ori: np.ndarray
    gripper: np.ndarray
    ee_pos: np.ndarray
    ee_ori: np.ndarray
    ee_vel: np.ndarray
    joint_pos: np.ndarray
    joint_vel: np.ndarray
    jacobian: np.ndarray
    mass: np.ndarray


def _load_mujoco() -> None:
    """Make libmujoco's functions known to the compiler's linker by name, so that compiled code can be cached."""
    folder = Path(mujoco.__file__).parent
    libraries = sorted(path for pattern in ("libmujoco*.so*", "libmujoco*.dylib") for path in folder.glob(pattern))
    if not libraries:
        raise ImportError(f"MuJoCo's shared library is not in {folder}. Install the wheel: pip install mujoco==3.3.2.")
    llvmlite.binding.load_library_permanently(str(libraries[0]))


_load_mujoco()
_STAGE = types.void(types.intp, types.intp)
_mj_step1 = types.ExternalFunction("mj_step1", _STAGE)
_mj_step2 = types.ExternalFunction("mj_step2", _STAGE)
_mj_actuation = types.ExternalFunction("mj_fwdActuation", _STAGE)
_mj_acceleration = types.ExternalFunction("mj_fwdAcceleration", _STAGE)
_mj_constraint = types.ExternalFunction("mj_fwdConstraint", _STAGE)
_mj_site_jacobian = types.ExternalFunction(
    "mj_jacSite", types.void(types.intp, types.intp, types.uintp, types.uintp, types.intc)
)
_mj_full_mass = types.ExternalFunction("mj_fullM", types.void(types.intp, types.uintp, types.uintp))


@compiled
def _read_kinematics(model, data, views, robot, state, scratch):  # type: ignore[no-untyped-def]
    """Read pose, velocity, Jacobian and mass matrix of the arm from the simulation into the controller's state."""
    jac_pos, jac_ori, mass = scratch[:3], scratch[3:6], scratch[6:]
    site = robot.site[0]
    _mj_site_jacobian(model, data, jac_pos.ctypes.data, jac_ori.ctypes.data, site)
    _mj_full_mass(model, mass.ctypes.data, views.qm.ctypes.data)
    state.ee_pos[:] = views.site_xpos[site]
    for i in range(3):
        for j in range(3):
            state.ee_ori[i, j] = views.site_xmat[site, 3 * i + j]
    # Over all degrees of freedom, also those of which the site is independent: a sum's length decides its last bit.
    state.ee_vel[:3] = np.dot(jac_pos, views.qvel)
    state.ee_vel[3:] = np.dot(jac_ori, views.qvel)
    for j in range(_ARM_JOINTS):
        dof = robot.arm_qvel[j]
        state.joint_pos[j] = views.qpos[robot.arm_qpos[j]]
        state.joint_vel[j] = views.qvel[dof]
        for i in range(3):
            state.jacobian[j, i] = jac_pos[i, dof]
            state.jacobian[j, 3 + i] = jac_ori[i, dof]
        for i in range(_ARM_JOINTS):
            state.mass[j, i] = mass[robot.arm_qvel[i], dof]


@compiled
def _set_goal(state, translation, rotation, rotates):  # type: ignore[no-untyped-def]
    """Move the goal relative to the present pose; a zero rotation keeps the earlier goal orientation."""
    if rotates:
        state.goal_ori[:] = np.dot(rotation, state.ee_ori)
    for i in range(3):
        state.goal_pos[i] = state.ee_pos[i] + translation[i]


@compiled
def _wrench(robot, state):  # type: ignore[no-untyped-def]
    """Force and torque ``[6]`` that a unit mass at the grip site would need to follow the goal."""
    wrench = np.empty(6)
    for k in range(3):
        i, j = (k + 1) % 3, (k + 2) % 3
        turn = 0.0
        for axis in range(3):
            now, goal = state.ee_ori[:, axis], state.goal_ori[:, axis]
            turn += now[i] * goal[j] - now[j] * goal[i]
        wrench[k] = (state.goal_pos[k] - state.ee_pos[k]) * robot.kp[k] + -state.ee_vel[k] * robot.kd[k]
        wrench[3 + k] = 0.5 * turn * robot.kp[3 + k] + -state.ee_vel[3 + k] * robot.kd[3 + k]
    return wrench


@compiled
def _posture_acceleration(robot, state):  # type: ignore[no-untyped-def]
    """Joint acceleration ``[7]`` that pulls the arm to its posture, critically damped."""
    kv = np.sqrt(_POSTURE_KP) * 2
    return _POSTURE_KP * (robot.posture - state.joint_pos) - kv * state.joint_vel


@compiled
def _torques_exact(robot, state):  # type: ignore[no-untyped-def]
    """Joint torques ``[7]`` without gravity: end effector plus posture in its null space, by pseudo-inverses.

    The arrays' memory order and the order of products are stock's: both decide the last bits.
    """
    mass, jacobian = state.mass.T, state.jacobian.T
    jac_pos, jac_ori = state.jacobian[:, :3].copy().T, state.jacobian[:, 3:].copy().T
    inverse = np.linalg.inv(mass)
    inertia = np.linalg.pinv(np.dot(np.dot(jacobian, inverse), state.jacobian))
    inertia_pos = np.linalg.pinv(np.dot(np.dot(jac_pos, inverse), jac_pos.T))
    inertia_ori = np.linalg.pinv(np.dot(np.dot(jac_ori, inverse), jac_ori.T))
    null_space = np.eye(_ARM_JOINTS) - np.dot(np.dot(np.dot(inverse, state.jacobian), inertia), jacobian)
    wrench = _wrench(robot, state)
    wrench = np.concatenate((np.dot(inertia_pos, wrench[:3]), np.dot(inertia_ori, wrench[3:])))
    posture = np.dot(null_space.T, np.dot(mass, _posture_acceleration(robot, state)))
    return np.dot(state.jacobian, wrench), posture


@compiled
def _control(robot, state, views, gripper, exact):  # type: ignore[no-untyped-def]
    """Write the actuators' controls of one substep."""
    task, posture = _torques_exact(robot, state) if exact else _torques_fast(robot, state)
    for j in range(_ARM_JOINTS):
        torque = task[j] + views.bias[robot.arm_qvel[j]] + posture[j]
        views.ctrl[robot.arm_ctrl[j]] = min(max(torque, robot.torque_low[j]), robot.torque_high[j])
    for finger in range(2):
        change = (2 * finger - 1) * _GRIPPER_SPEED * gripper
        target = min(max(state.gripper[finger] + change, -1.0), 1.0)
        state.gripper[finger] = target
        views.ctrl[robot.gripper_ctrl[finger]] = robot.gripper_bias[finger] + robot.gripper_weight[finger] * target


@compiled
def _cholesky_solve(matrix, right):  # type: ignore[no-untyped-def]
    """Solves ``matrix x = right`` in place for a symmetric positive definite matrix and one or more right sides."""
    n, columns = right.shape
    for j in range(n):
        for k in range(j):
            matrix[j, j] -= matrix[j, k] * matrix[j, k]
        # A pose in which the arm has lost a direction gives a pivot of rounding errors: ask nothing along it.
        pivot = math.sqrt(matrix[j, j]) if matrix[j, j] > 1e-12 else np.inf
        matrix[j, j] = pivot
        for i in range(j + 1, n):
            for k in range(j):
                matrix[i, j] -= matrix[i, k] * matrix[j, k]
            matrix[i, j] /= pivot
        for column in range(columns):
            for k in range(j):
                right[j, column] -= matrix[j, k] * right[k, column]
            right[j, column] /= pivot
    for column in range(columns):
        for j in range(n - 1, -1, -1):
            for k in range(j + 1, n):
                right[j, column] -= matrix[k, j] * right[k, column]
            right[j, column] /= matrix[j, j]


@compiled
def _torques_fast(robot, state):  # type: ignore[no-untyped-def]
    """Return the same torques in exact arithmetic, by Cholesky factors in place of pseudo-inverses.

    With ``N = I - M^-1 J^T L J`` and ``L = (J M^-1 J^T)^-1``, ``N^T M a = M a - J^T L J a``.
    """
    solved = state.jacobian.copy()
    _cholesky_solve(state.mass.copy(), solved)
    admittance = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            for k in range(_ARM_JOINTS):
                admittance[i, j] += state.jacobian[k, i] * solved[k, j]
    wrench = _wrench(robot, state).reshape(6, 1)
    _cholesky_solve(admittance[:3, :3].copy(), wrench[:3])
    _cholesky_solve(admittance[3:, 3:].copy(), wrench[3:])
    acceleration = _posture_acceleration(robot, state)
    reaction = np.zeros((6, 1))
    for i in range(6):
        for k in range(_ARM_JOINTS):
            reaction[i, 0] += state.jacobian[k, i] * acceleration[k]
    _cholesky_solve(admittance, reaction)
    task, posture = np.zeros(_ARM_JOINTS), np.zeros(_ARM_JOINTS)
    for j in range(_ARM_JOINTS):
        for i in range(6):
            task[j] += state.jacobian[j, i] * wrench[i, 0]
            posture[j] -= state.jacobian[j, i] * reaction[i, 0]
        for k in range(_ARM_JOINTS):
            posture[j] += state.mass[j, k] * acceleration[k]
    return task, posture


@compiled
def hide_sleeping(trees, sleep):  # type: ignore[no-untyped-def]
    """Lets those bodies of the model collide, and no others, that are awake in a slot."""
    for body in range(trees.body_tree.shape[0]):
        tree = trees.body_tree[body]
        collides = tree < 0 or not sleep.asleep[tree]
        trees.body_contype[body] = trees.contype[body] if collides else 0
        trees.body_conaffinity[body] = trees.conaffinity[body] if collides else 0


@compiled
def _hold(trees, sleep, views):  # type: ignore[no-untyped-def]
    """Undoes what a substep did to those that sleep: without contacts they fall."""
    for tree in range(sleep.asleep.shape[0]):
        if sleep.asleep[tree]:
            for i in range(trees.qpos[tree, 0], trees.qpos[tree, 1]):
                views.qpos[i] = sleep.pose[i]
            for i in range(trees.dofs[tree, 0], trees.dofs[tree, 1]):
                views.qvel[i] = 0.0


@compiled
def wake(trees, sleep, views):  # type: ignore[no-untyped-def]
    """Wakes what something that is awake has come near to, and in turn what that is near to.

    Args:
        trees: ``Trees`` of the model.
        sleep: ``Sleep`` of the slot.
        views: ``DataViews`` of the slot; poses of geoms are read.
    """
    woken = False
    again = True
    while again:
        again = False
        for i in range(trees.geom.shape[0]):
            if sleep.asleep[trees.geom_tree[i]]:
                continue
            centre = views.geom_xpos[trees.geom[i]]
            reach = trees.radius[i] * trees.radius[i]
            for tree in range(sleep.asleep.shape[0]):
                if not sleep.asleep[tree]:
                    continue
                gap = 0.0
                for axis in range(3):
                    beyond = max(
                        sleep.bounds[tree, axis] - centre[axis], centre[axis] - sleep.bounds[tree, 3 + axis], 0.0
                    )
                    gap += beyond * beyond
                if gap < reach:
                    sleep.asleep[tree] = 0
                    woken = again = True
    if woken:
        hide_sleeping(trees, sleep)


@compiled
def control_step(  # type: ignore[no-untyped-def]
    model, data, views, sampled, robot, state, goals, index, sample, trees, sleep, exact
):
    """Run one control step: 25 substeps, each with the controller's torques.

    Args:
        model: address of the ``mjModel``.
        data: address of the ``mjData``.
        views: ``DataViews`` of the same ``mjData``.
        sampled: tuple of arrays of the ``mjData`` to sample, flat.
        robot: ``Robot`` of the model.
        state: ``ArmState`` of the slot, updated in place.
        goals: ``Goals`` of a chunk of actions.
        index: which of them to run.
        sample: ``float64 [sum of their sizes]``, where stock's observations of this step are copied.
        trees: ``Trees`` of the model, in which what sleeps has been made to collide with nothing.
        sleep: ``Sleep`` of the slot; nothing wakes or sleeps if exact.
        exact: whether to do everything stock does.
    """
    scratch = np.zeros((6 + views.qvel.shape[0], views.qvel.shape[0]))
    for substep in range(SUBSTEPS):
        _mj_step1(model, data)
        if exact:
            # Stock evaluates the forward dynamics here with the last substep's controls, once, and once more when its
            # controller reads the state. Nothing of it is used but the solver's warm start, which only
            # mj_fwdConstraint changes.
            _mj_actuation(model, data)
            _mj_acceleration(model, data)
            _mj_constraint(model, data)
            if not state.stale[0]:
                _mj_constraint(model, data)
        if not state.stale[0]:
            _read_kinematics(model, data, views, robot, state, scratch)
        state.stale[0] = 0
        if substep == 0:
            _set_goal(state, goals.translation[index], goals.rotation[index], goals.rotates[index])
        _control(robot, state, views, goals.gripper[index], exact)
        _mj_step2(model, data)
        if not exact:
            _hold(trees, sleep, views)
            wake(trees, sleep, views)
        if substep == _SAMPLED_SUBSTEP:
            start = 0
            for array in sampled:
                sample[start : start + array.shape[0]] = array
                start += array.shape[0]
