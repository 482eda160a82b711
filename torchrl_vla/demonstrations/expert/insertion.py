"""Putting an object into a compartment that is open at its side only, such as a microwave's or a shelf's."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.arm import GRIPPER_CLOSE, GRIPPER_OPEN, Arm
from torchrl_vla.demonstrations.expert.articulation import find_articulation
from torchrl_vla.demonstrations.expert.geometry import CollisionPoints, yaw_rotation
from torchrl_vla.demonstrations.expert.handles import Hold
from torchrl_vla.demonstrations.expert.motion import Phase, release, rise, straight, travel
from torchrl_vla.demonstrations.expert.task_goals import Goal, UnreachableGoalError

__all__ = ["Insertion", "is_covered"]

_SLANTS, _YAWS, _DEPTHS = np.radians([60.0, 45.0, 30.0, 75.0]), np.radians([0.0, -20.0, 20.0]), (0.012, 0.025, 0.04)
_WIDEST_PIECE, _NEIGHBOURHOOD = 0.04, 0.4
#: Cost of a point that the hand would hit, a radian of turn, a metre from the object's middle.
_HIT, _TURN, _OFF = 1.0, 0.5, 5.0
_APPROACH, _LIFT, _GAP, _MARGIN, _OUTSIDE, _RETREAT = 0.07, 0.03, 0.006, 0.008, 0.12, 0.12
_CORRIDOR, _CORRIDOR_LENGTH, _OPEN_RADIUS, _RISE = 0.04, 0.3, 0.02, 0.12
_CLOSE_STEPS, _LONG_STEPS, _LOST_STEPS = 12, 60, 3
_REACH_SPEED, _LIFT_SPEED, _CARRY_SPEED, _INSERT_SPEED = 0.6, 0.4, 0.7, 0.5


def is_covered(data: mujoco.MjData, surfaces: CollisionPoints, site: int, body: int) -> bool:
    """Whether a part of what a region belongs to is above its middle.

    Args:
        data: current poses.
        surfaces: collision points of the model.
        site: the region.
        body: root body of what it belongs to.
    """
    place = data.site_xpos[site]
    around, _ = surfaces.split(data, body)
    above = around[:, 2] > place[2]
    return bool((np.linalg.norm(around[above, :2] - place[:2], axis=1) < _OPEN_RADIUS).any())


@dataclass(frozen=True)
class _Compartment:
    """A region to put something in: its open side, floor and where an object's origin may be along that way."""

    outward: np.ndarray
    floor: float
    front: float
    back: float
    centre: np.ndarray
    deepest: float
    shallowest: float


class Insertion:
    """Brings an object into a compartment through its open side.

    Args:
        model: the compiled model.
        arm: the arm.
        surfaces: collision points of the model.
        goal: ``in``, the object, and the site where it belongs.
    """

    def __init__(self, model: mujoco.MjModel, arm: Arm, surfaces: CollisionPoints, goal: Goal) -> None:
        self._model = model
        self._arm = arm
        self._surfaces = surfaces
        self._goal = goal
        self._body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, f"{goal.subject}_main")
        self._site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, goal.target)
        root = int(model.body_rootid[model.site_bodyid[self._site]])
        door = find_articulation(model, goal.target)
        fixed = model.body_rootid == root
        if door is not None:
            fixed[door.bodies] = False
        self._walls = np.flatnonzero(fixed)

    def check(self, data: mujoco.MjData) -> None:
        """Refuses a compartment without an open side, and an object that cannot be held for it.

        Args:
            data: current poses.

        Raises:
            UnreachableGoalError: it is one of these.
        """
        compartment = self._compartment(data)
        self._plan(data, compartment)

    def done(self, data: mujoco.MjData) -> bool:
        """Whether the object's origin is in the region."""
        half = np.abs(data.site_xmat[self._site].reshape(3, 3) @ self._model.site_size[self._site])
        return bool((np.abs(data.xpos[self._body] - data.site_xpos[self._site]) < half).all())

    def script(self, data: mujoco.MjData) -> Generator[np.ndarray, None, None]:
        """Yield actions ``[7]`` until the object was put into the compartment.

        Args:
            data: the simulation, read anew before every action.
        """
        arm = self._arm
        while True:
            compartment = self._compartment(data)
            hold, way = self._plan(data, compartment)
            if (yield from self._bring(data, compartment, hold, way)):
                return
            here, rotation = arm.pose(data)
            yield from release(arm, data, rotation)
            yield from rise(arm, data, here[2] + _RISE)

    def _bring(self, data: mujoco.MjData, compartment: _Compartment, hold: Hold, way: np.ndarray) -> Phase:
        arm, rotation = self._arm, hold.rotation
        approach = rotation[:, 2]
        _, others = self._surfaces.split(data, self._body)
        if not (yield from travel(arm, data, hold.position - _APPROACH * approach, rotation, GRIPPER_OPEN, others)):
            return False
        yield from straight(arm, data, hold.position, rotation, GRIPPER_OPEN, _REACH_SPEED, 25)
        for _ in range(_CLOSE_STEPS):
            yield arm.towards(data, hold.position, rotation, GRIPPER_CLOSE)
        here, _ = arm.pose(data)
        start = data.xpos[self._body].copy()
        yield from straight(arm, data, here + [0.0, 0.0, _LIFT], rotation, GRIPPER_CLOSE, _LIFT_SPEED)
        if arm.fingers_touching(data, self._body) < 2:
            return False
        # Way points of the object's origin, the hand keeps its orientation.
        end = start + way
        before = end + _OUTSIDE * compartment.outward
        here, _ = arm.pose(data)
        held = here - data.xpos[self._body]
        lifted = np.array([*before[:2], max(before[2], data.xpos[self._body][2])])
        for place, speed in ((lifted, _CARRY_SPEED), (before, _INSERT_SPEED), (end, _INSERT_SPEED)):
            for _ in range(_LONG_STEPS):
                offset, turn = arm.offset(data, place + held, rotation)
                if np.linalg.norm(offset) < 0.008 and np.linalg.norm(turn) < 0.12:
                    break
                if arm.fingers_touching(data, self._body) < 1:
                    return False
                yield arm.towards(data, place + held, rotation, GRIPPER_CLOSE, speed)
        yield from release(arm, data, rotation)
        here, _ = arm.pose(data)
        away = here + _RETREAT * compartment.outward
        yield from straight(arm, data, away, rotation, GRIPPER_OPEN)
        return self.done(data)

    def _compartment(self, data: mujoco.MjData) -> _Compartment:
        model, site = self._model, self._site
        matrix = data.site_xmat[site].reshape(3, 3)
        centre, half = data.site_xpos[site].copy(), np.abs(matrix @ model.site_size[site])
        walls, _ = self._surfaces.part(data, self._walls)
        offset = walls - centre
        base, _ = self._arm.pose(data)
        best = None
        for outward in (sign * np.eye(3)[i] for i in (0, 1) for sign in (1.0, -1.0)):
            along = offset @ outward
            beside = offset - np.outer(along, outward)
            blocked = (along > 0) & (along < _CORRIDOR_LENGTH) & (np.abs(beside) < _CORRIDOR).all(axis=1)
            if blocked.any():
                continue
            nearness = float(outward @ (base - centre))
            if best is None or nearness > best[0]:
                best = nearness, outward, along
        if best is None:
            raise UnreachableGoalError(
                f"The scripted expert cannot reach the goal {self._goal}: {self._goal.target} is covered and open at "
                "no side. Choose a task whose place is open above or at a side."
            )
        _, outward, along = best
        reach = float(np.abs(outward) @ half)
        side = np.abs(offset - np.outer(along, outward))
        inside = (side[:, :2] < half[:2] + 0.02).all(axis=1) & (side[:, 2] < half[2] + 0.03)
        below = (np.abs(offset[:, :2]) < 0.05).all(axis=1) & (offset[:, 2] < 0)
        middle = (side[:, :2] < _CORRIDOR).all(axis=1) & (side[:, 2] < _CORRIDOR) & (along < 0)
        floor = float(walls[below, 2].max(initial=self._surfaces.ground(data)))
        return _Compartment(
            outward,
            floor,
            float(along[inside].max(initial=reach)),
            float(along[middle].max(initial=-np.inf)),
            centre,
            -reach,
            reach,
        )

    def _plan(self, data: mujoco.MjData, compartment: _Compartment) -> tuple[Hold, np.ndarray]:
        """How to hold the object, and how far to move it."""
        arm, outward = self._arm, compartment.outward
        pieces = self._surfaces.pieces(data, self._body)
        points, others = self._surfaces.split(data, self._body)
        origin = data.xpos[self._body].copy()
        reach = (points - origin) @ outward
        along = min(compartment.front - reach.max() - _MARGIN, compartment.shallowest - _MARGIN)
        along = max(along, compartment.back - reach.min() + _MARGIN, compartment.deepest + _MARGIN)
        along = min(along, compartment.shallowest - _MARGIN)
        end = compartment.centre + along * outward
        end[2] = compartment.floor + origin[2] - points[:, 2].min() + _GAP
        way = end - origin
        around = _near(np.concatenate([points, others]), origin)
        walls = _near(others, end)
        ground = self._surfaces.ground(data)
        middle = (points.min(axis=0) + points.max(axis=0)) / 2
        best: tuple[float, Hold] | None = None
        for slant, yaw in itertools.product(_SLANTS, _YAWS):
            inward = -(yaw_rotation(yaw) @ outward)
            approach = np.sin(slant) * inward + np.array([0.0, 0.0, -np.cos(slant)])
            fingers = np.cross(inward, [0.0, 0.0, 1.0])
            for piece, depth in itertools.product(pieces, _DEPTHS):
                if np.ptp(piece @ fingers) > _WIDEST_PIECE:
                    continue
                position = (piece.min(axis=0) + piece.max(axis=0)) / 2
                position[2] = max(piece[:, 2].max() - depth, (piece[:, 2].min() + piece[:, 2].max()) / 2)
                cost = _OFF * float(np.linalg.norm((position - middle)[:2]))
                if best is not None and cost >= best[0]:
                    continue
                for sign in (1.0, -1.0):
                    axis = sign * fingers
                    rotation = np.column_stack([axis, np.cross(approach, axis), approach])
                    if (
                        min(
                            arm.lowest(position, rotation) - ground,
                            arm.lowest(position + way, rotation) - compartment.floor,
                        )
                        < 0
                    ):
                        continue
                    total = cost + _TURN * arm.turn(data, position, rotation)
                    if best is not None and total >= best[0]:
                        continue
                    total += _HIT * (
                        arm.hits(around, position, rotation)
                        + arm.hits(walls, position + way, rotation)
                        + arm.hits(walls, position + way + 0.03 * outward, rotation)
                    )
                    if best is None or total < best[0]:
                        best = total, Hold(position, rotation)
        if best is None:
            raise UnreachableGoalError(
                f"The scripted expert cannot reach the goal {self._goal}: {self._goal.subject} has no part that the "
                f"hand could hold to bring it into {self._goal.target} from its side."
            )
        return best[1], way


def _near(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Points that a hand could meet around a place, as columns ``[3, n]``."""
    return np.ascontiguousarray(points[np.linalg.norm(points - centre, axis=1) < _NEIGHBOURHOOD].T)
