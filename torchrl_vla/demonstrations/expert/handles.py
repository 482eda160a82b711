"""Where to hold the handle of a drawer or door to open it, and where to push to close it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.arm import Arm
from torchrl_vla.demonstrations.expert.articulation import Articulation
from torchrl_vla.demonstrations.expert.geometry import minimum_area_rectangle

__all__ = ["PUSH_GAP", "Hold", "plan_hold", "plan_push"]

_DEPTH, _NEIGHBOURHOOD = 0.017, 0.35
_SLANTS = np.radians([60.0, 70.0, 50.0, 80.0, 40.0])
_PUSH_SLANTS = np.radians([30.0, 20.0, 40.0, 50.0, 10.0, 0.0])
_SHIFTS, _BACKS = (0.0, 0.008, 0.016), (0.0, 0.006)
#: How far in front of a part the fingers are put that push it, in metres.
PUSH_GAP = 0.03
_PUSH_DEPTH = 0.02
#: Cost of a point that the hand would hit, a radian of turn, a metre that a hold is off the handle's middle, a metre of
#: the arm's strain.
_HIT, _TURN, _OFF, _STRAIN = 1.0, 1.0, 50.0, 50.0


@dataclass(frozen=True)
class Hold:
    """A pose of the hand at a part that is to be moved.

    Args:
        position: of the grip site, ``[3]`` in metres.
        rotation: of the grip site, ``[3, 3]``.
    """

    position: np.ndarray
    rotation: np.ndarray


def plan_hold(
    arm: Arm, data: mujoco.MjData, joint: Articulation, points: np.ndarray, others: np.ndarray, ground: float
) -> list[Hold]:
    """Find ways to take hold of a handle: the hand comes slantwise from in front of it, a finger on either side.

    Args:
        arm: the arm.
        data: current poses.
        joint: what is to be opened.
        points: collision points of the part, ``[n, 3]`` in metres.
        others: collision points of everything else, ``[m, 3]``.
        ground: height of the table top.

    Returns:
        list: the best way for each slant of the hand, the best first; none where the hand would be in the table.
    """
    handle, outward = _handle(data, joint, points)
    low, high = handle.min(axis=0), handle.max(axis=0)
    centre = (low + high) / 2
    upright = high[2] - low[2] > max((high - low)[:2])
    across = np.cross(outward, [0.0, 0.0, 1.0])
    obstacles = _near(np.concatenate([points, others]), centre)
    found = []
    for slant in _SLANTS:
        approach = _slanted(outward, slant)
        fingers = across if upright else np.cross(approach, across)
        best: tuple[float, Hold] | None = None
        for shift, back, sign in itertools.product((0.0,) if upright else _SHIFTS, _BACKS, (1.0, -1.0)):
            position = centre - back * approach + shift * fingers * np.sign(fingers @ outward)
            rotation = np.column_stack([sign * fingers, np.cross(approach, sign * fingers), approach])
            if arm.lowest(position, rotation) < ground:
                continue
            hits = arm.hits(obstacles, position, rotation) + arm.hits(obstacles, position - 0.02 * approach, rotation)
            turn = arm.turn(data, position, rotation)
            strain = arm.strain(data, position, rotation)
            cost = _HIT * hits + _TURN * turn + _OFF * (shift + back) + _STRAIN * strain
            if best is None or cost < best[0]:
                best = cost, Hold(position, rotation)
        if best is not None:
            found.append(best)
    return [hold for _, hold in sorted(found, key=lambda pair: pair[0])]


def plan_push(arm: Arm, data: mujoco.MjData, joint: Articulation, points: np.ndarray, others: np.ndarray) -> list[Hold]:
    """Find ways for the closed fingers to push a part shut: from above and slantwise, at what sticks out furthest.

    Args:
        arm: the arm.
        data: current poses.
        joint: what is to be closed.
        points: collision points of the part, ``[n, 3]`` in metres.
        others: collision points of everything else, ``[m, 3]``.

    Returns:
        list: one for each slant of the hand, the best first.
    """
    handle, outward = _handle(data, joint, points)
    low, high = handle.min(axis=0), handle.max(axis=0)
    centre = (low + high) / 2
    across = np.cross(outward, [0.0, 0.0, 1.0])
    position = np.array([*(centre + PUSH_GAP * outward)[:2], max(high[2] - _PUSH_DEPTH, centre[2])])
    change = joint.closed - joint.value(data)
    obstacles = _near(others, joint.carried(data, centre, np.eye(3), change)[0])
    found = []
    for order, (slant, sign) in enumerate(itertools.product(_PUSH_SLANTS, (1.0, -1.0))):
        approach = _slanted(outward, slant)
        rotation = np.column_stack([sign * across, np.cross(approach, sign * across), approach])
        end, end_rotation = joint.carried(data, position - PUSH_GAP / 2 * outward, rotation, change)
        turns = [arm.turn(data, position, turned) for turned in (rotation, end_rotation)]
        strain = arm.strain(data, position, rotation) + arm.strain(data, end, end_rotation)
        cost = _HIT * arm.hits(obstacles, end, end_rotation) + _TURN * max(turns) + _STRAIN * strain
        found.append((cost, order, Hold(position, rotation)))
    ranked = sorted(found, key=lambda entry: entry[:2])
    return [hold for _, order, hold in ranked]


def _handle(data: mujoco.MjData, joint: Articulation, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of what sticks out furthest, and the direction in which it moves when opened."""
    outward = joint.outward(data, (points.min(axis=0) + points.max(axis=0)) / 2)
    if not joint.slides:
        # A door's hinge is not quite in its plane.
        _, direction, _, _ = minimum_area_rectangle(points[:, :2])
        normal = np.array([-np.sin(direction), np.cos(direction), 0.0])
        outward = normal * np.sign(normal @ outward)
    along = points @ outward
    return points[along > along.max() - _DEPTH], outward


def _slanted(outward: np.ndarray, slant: float) -> np.ndarray:
    return -np.sin(slant) * outward + np.array([0.0, 0.0, -np.cos(slant)])


def _near(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Points that a hand could meet around a place, as columns ``[3, n]``."""
    return np.ascontiguousarray(points[np.linalg.norm(points - centre, axis=1) < _NEIGHBOURHOOD].T)
