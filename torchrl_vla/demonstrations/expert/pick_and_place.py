"""Moving one object to where it belongs, phase by phase, again if it was lost."""

from __future__ import annotations

from collections.abc import Callable, Generator

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.arm import GRIPPER_CLOSE, GRIPPER_OPEN, Arm
from torchrl_vla.demonstrations.expert.articulation import find_articulation
from torchrl_vla.demonstrations.expert.geometry import CollisionPoints, yaw_rotation
from torchrl_vla.demonstrations.expert.grasps import Grasp, plan_grasp
from torchrl_vla.demonstrations.expert.motion import Phase, release, rise, straight
from torchrl_vla.demonstrations.expert.placement import (
    clear_height,
    free_place,
    hand_pose_for,
    leave_overhang,
    plan_carry,
    release_height,
)
from torchrl_vla.demonstrations.expert.task_goals import Goal, UnreachableGoalError

__all__ = ["PickAndPlace"]

_APPROACH, _LIFT, _LIFT_SPEED, _RETREAT = 0.07, 0.04, 0.3, 0.08
_HOVER_OFFSET, _HOVER_TURN, _HOVER_STEPS = 0.012, 0.12, 60
_DESCENT_SPEED, _DESCENT_OFFSET, _DESCENT_GAP, _DESCENT_STEPS = 0.8, 0.006, 0.004, 30
_CLOSE_STEPS, _CLOSE_STEPS_AT_MOST, _FIRM_STEPS = 9, 18, 3
_LOWER_SPEED, _LOWER_STEPS, _CARRY_STEPS = 0.7, 40, 100
#: An object that moved this far since its grasp was planned needs another one.
_MOVED = 0.008
#: Control steps without both fingers' touch after which an object counts as lost.
_LOST_STEPS = 3
#: How near to another object's origin LIBERO wants one that is on it, and how far outside a site, in metres.
_ON_RADIUS, _ON_HEIGHT, _IN_SLACK = 0.03, 0.10, 0.01
#: How far below the top of a container's wall the grip site may go.
_WALL_OVERLAP = 0.02
#: Where on a site that is shared an object stands, as a share of its half-size; what is higher than this, in metres,
#: above the site is in its way.
_SHARE, _SHARE_HEIGHT = 0.7, 0.01
_ESCAPE_STEPS = 40
#: How much higher than it is let go of something is carried over a drawer's front, in metres.
_OVER_DRAWER = 0.05


class PickAndPlace:
    """Brings an object onto another one, onto a site or into a container.

    Args:
        model: the compiled model.
        arm: the arm.
        surfaces: collision points of the model.
        goal: ``on`` or ``in``, the object, and the object or site where it belongs.
        shared: whether another object belongs on the same site, so that this one leaves room for it.

    Raises:
        UnreachableGoalError: it is of another kind, or names something that the model does not have.
    """

    def __init__(
        self, model: mujoco.MjModel, arm: Arm, surfaces: CollisionPoints, goal: Goal, *, shared: bool = False
    ) -> None:
        self._goal = goal
        self._arm = arm
        self._surfaces = surfaces
        self._into = goal.predicate == "in"
        self._shared = shared
        self._model = model
        self._body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, f"{goal.subject}_main")
        self._site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, goal.target)
        target = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, f"{goal.target}_main")
        self._target = int(model.body_rootid[model.site_bodyid[self._site]]) if self._site >= 0 else target
        drawer = find_articulation(model, goal.target)
        #: What has to be lowered into: a drawer's own walls, or the whole of another container.
        self._slides = drawer is not None and drawer.slides and self._into
        self._walls = drawer.bodies if drawer else np.flatnonzero(model.body_rootid == self._target)
        free = model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
        self._movable = free[free != self._body]
        if self._body < 0 or self._target < 0:
            missing = goal.subject if self._body < 0 else goal.target
            raise UnreachableGoalError(f"The model has no object or site {missing!r}, which the goal {goal} names.")

    def done(self, data: mujoco.MjData) -> bool:
        """Whether the object is where it belongs, its contacts aside.

        Args:
            data: current poses.
        """
        offset = self._origin(data) - self._target_position(data)
        if self._site < 0:
            return bool(offset[2] >= 0.0 and np.linalg.norm(offset[:2]) < _ON_RADIUS)
        matrix, size = data.site_xmat[self._site].reshape(3, 3), self._model.site_size[self._site]
        if self._into:
            return bool((np.abs(offset) < np.abs(matrix @ size) + [0.0, 0.0, _IN_SLACK]).all())
        local = matrix @ offset
        return bool((np.abs(local[:2]) < size[:2]).all() and abs(local[2]) < size[2] + _ON_HEIGHT)

    def script(self, data: mujoco.MjData) -> Generator[np.ndarray, None, None]:
        """Yield actions ``[7]`` until the object was put down at its place.

        Args:
            data: the simulation, read anew before every action.
        """
        failed: list[np.ndarray] = []
        while True:
            points, others = self._surfaces.split(data, self._body)
            origin = self._origin(data)
            carry = self._target_position(data) - origin
            avoid = [origin + offset for offset in failed]
            grasp = plan_grasp(self._arm, data, points, others, approach=_APPROACH, carry=carry, avoid=avoid)
            if not (yield from self._pick(data, grasp, others)):
                failed.append(grasp.position - origin)
            elif (yield from self._place(data, grasp)):
                return
            yield from rise(self._arm, data, points[:, 2].max() + _APPROACH)

    def _target_position(self, data: mujoco.MjData) -> np.ndarray:
        return (data.site_xpos[self._site] if self._site >= 0 else data.xpos[self._target]).copy()

    def _own_place(self, data: mujoco.MjData, points: np.ndarray, others: np.ndarray) -> np.ndarray:
        site, origin = self._site, self._origin(data)
        centre, axes = data.site_xpos[site], data.site_xmat[site].reshape(3, 3).T
        turn = float(self._arm.azimuth(data, centre) - self._arm.azimuth(data, origin))
        shape = (points - origin) @ yaw_rotation(turn).T
        places = [centre + sign * _SHARE * self._model.site_size[site, i] * axes[i] for i in (0, 1) for sign in (1, -1)]
        return free_place(shape, places, others[others[:, 2] > centre[2] + _SHARE_HEIGHT], centre)

    def _origin(self, data: mujoco.MjData) -> np.ndarray:
        return data.xpos[self._body].copy()

    def _pick(self, data: mujoco.MjData, grasp: Grasp, others: np.ndarray) -> Phase:
        arm, above = self._arm, grasp.position + [0.0, 0.0, _APPROACH]
        start = self._origin(data)

        def in_place() -> bool:
            return bool(np.linalg.norm(self._origin(data) - start) < _MOVED)

        here, _ = arm.pose(data)
        clear = clear_height(here, above, others)
        if clear > here[2]:
            yield from rise(self._arm, data, clear)
        for step in range(_HOVER_STEPS + 1):
            offset, turn = arm.offset(data, above, grasp.rotation)
            if np.linalg.norm(offset[:2]) < _HOVER_OFFSET and np.linalg.norm(turn) < _HOVER_TURN:
                break
            if step == _HOVER_STEPS or not in_place():
                return False
            far = np.linalg.norm(offset[:2]) > _HOVER_OFFSET
            towards = np.array([*above[:2], max(above[2], clear)]) if far else above
            yield arm.towards(data, towards, grasp.rotation, GRIPPER_OPEN)
        for _ in range(_DESCENT_STEPS):
            offset, _ = arm.offset(data, grasp.position, grasp.rotation)
            if abs(offset[2]) < _DESCENT_GAP and np.linalg.norm(offset[:2]) < _DESCENT_OFFSET:
                break
            if not in_place():
                return False
            yield arm.towards(data, grasp.position, grasp.rotation, GRIPPER_OPEN, _DESCENT_SPEED)
        heights = data.xpos[self._movable, 2].copy()
        firm = 0
        for step in range(_CLOSE_STEPS_AT_MOST):
            firm = firm + 1 if arm.fingers_touching(data, self._body) == 2 else 0
            if step >= _CLOSE_STEPS and firm >= _FIRM_STEPS:
                break
            yield arm.towards(data, grasp.position, grasp.rotation, GRIPPER_CLOSE)
        here, _ = arm.pose(data)
        yield from straight(arm, data, here + [0.0, 0.0, _LIFT], grasp.rotation, GRIPPER_CLOSE, _LIFT_SPEED)
        if (data.xpos[self._movable, 2] - heights).max(initial=0.0) > _LIFT / 2:
            # A bowl that stood in another one can take it along: put both down.
            yield from straight(arm, data, here, grasp.rotation, GRIPPER_CLOSE, _LIFT_SPEED)
            yield from release(arm, data, grasp.rotation)
            return False
        return arm.fingers_touching(data, self._body) == 2

    def _place(self, data: mujoco.MjData, grasp: Grasp) -> Phase:
        arm = self._arm
        target = self._target_position(data)
        points, others = self._surfaces.split(data, self._body)
        way_out = leave_overhang(points, others, self._origin(data), grasp.rotation, arm.pose(data)[0])
        if way_out.any():
            here, rotation = arm.pose(data)
            yield from straight(arm, data, here + way_out, rotation, GRIPPER_CLOSE, steps=_ESCAPE_STEPS)
            points, others = self._surfaces.split(data, self._body)
        if self._shared:
            target = self._own_place(data, points, others)
        ground = self._surfaces.ground(data)
        origin, (here, rotation) = self._origin(data), arm.pose(data)
        held = rotation.T @ (origin - here)
        low = release_height(points, origin, others, target[:2], ground)
        if self._into:
            walls, _ = self._surfaces.part(data, self._walls)
            low = max(low, walls[:, 2].max() - _WALL_OVERLAP + (origin - here)[2])
        lowest = low
        if self._slides:
            # What brushes against a drawer's front shuts it.
            lowest += _OVER_DRAWER
        path = plan_carry(points, origin, others, target[:2], ground, lowest)
        lost = self._loss_detector(data)
        if path.rise_first or self._slides:
            top = here + [0.0, 0.0, path.height(0.0) - origin[2]]
            yield from straight(arm, data, top, rotation, GRIPPER_CLOSE)
        climb = path.height(path.length) - low
        low_position, rotation = hand_pose_for(arm, data, np.array([*target[:2], low]), held, grasp.wrist_angle, climb)
        for _ in range(_CARRY_STEPS):
            offset, turn = arm.offset(data, low_position, rotation)
            distance = float(np.linalg.norm(offset[:2]))
            if distance < _HOVER_OFFSET and np.linalg.norm(turn) < _HOVER_TURN:
                break
            if lost():
                return False
            clear = np.array([0.0, 0.0, path.height(path.length - distance) - low])
            yield arm.towards(data, _climb_first(low_position + clear, offset + clear), rotation, GRIPPER_CLOSE)
        for _ in range(_LOWER_STEPS):
            offset, _ = arm.offset(data, low_position, rotation)
            if abs(offset[2]) < _DESCENT_GAP and np.linalg.norm(offset[:2]) < _DESCENT_OFFSET:
                break
            if lost():
                return False
            yield arm.towards(data, low_position, rotation, GRIPPER_CLOSE, _LOWER_SPEED)
        here, _ = arm.pose(data)
        yield from release(arm, data, rotation)
        yield from straight(arm, data, here + [0.0, 0.0, _RETREAT], rotation, GRIPPER_OPEN)
        return True

    def _loss_detector(self, data: mujoco.MjData) -> Callable[[], bool]:
        """Says, asked once a control step, whether the object slipped out of the fingers."""
        steps_without = 0

        def lost() -> bool:
            nonlocal steps_without
            touching = self._arm.fingers_touching(data, self._body) == 2
            steps_without = 0 if touching else steps_without + 1
            return steps_without >= _LOST_STEPS

        return lost


def _climb_first(position: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return a nearer goal on the way to a position, so that a climb is at least as steep as 45 degrees.

    Args:
        position: where to go, ``[3]`` in metres.
        offset: what is left to there, ``[3]``.
    """
    climb, distance = offset[2], float(np.linalg.norm(offset[:2]))
    if climb < _HOVER_OFFSET or distance <= climb:
        return position
    return position - np.array([*offset[:2], 0.0]) * (1.0 - climb / distance)
