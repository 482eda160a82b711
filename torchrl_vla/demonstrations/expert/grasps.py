"""Where to take hold of an object: candidates from its shape, scored against everything around it."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.arm import Arm
from torchrl_vla.demonstrations.expert.geometry import minimum_area_rectangle

__all__ = ["Grasp", "plan_grasp"]

#: The widest side that the fingers, which open 80 mm, are put across.
_LARGEST_WIDTH = 0.072
_LARGEST_WRIST_TURN = 1.9
_RIM_ANGLES, _RIM_SECTOR, _RIM_THICKNESS = 24, np.radians(12.0), 0.006
_RIM_INSET, _RIM_SHIFTS, _RIM_DEPTHS, _RIM_CLEARANCE = 0.0045, (0.0, 0.008, 0.016), (0.022, 0.016), 0.012
#: Where above an object the hand that grasps it is, in metres.
_HAND_ABOVE = 0.08
#: How far a knob may stand out, how wide it may be, and how far the fingertips reach beyond the site, in metres.
_KNOB_HEIGHTS, _KNOB_WIDTH, _TIP = (0.025, 0.02, 0.015), 0.04, 0.0125
_SIDE_TURNS = np.radians([0.0, -8.0, 8.0, -16.0, 16.0, -24.0, 24.0])
_SIDE_SHIFTS = (0.0, -0.4, 0.4, -0.6, 0.6)
_SIDE_DEPTH, _LOW_HEIGHT, _LOW_CLEARANCE, _LOW_FRACTION = 0.026, 0.03, 0.010, 0.55
#: Cost of a radian of wrist turn, a metre of shift, a metre that a grasp is too shallow, a radian off the side's
#: direction, a metre of width, a radian of tilt across the fingers, a point that the hand would hit.
_TURN, _SHIFT, _SHALLOW, _SKEW, _WIDTH, _TILT, _HIT = 0.25, 20.0, 20.0, 3.0, 8.0, 3.0, 0.2
#: Cost of being this near, in metres, to a grasp that failed.
_FAILED, _FAILED_RADIUS = 1.0, 0.02
_MARGIN, _NEIGHBOURHOOD, _BELOW = 0.004, 0.28, 0.08
_RESCORED, _CARRY_FRACTIONS, _CARRY_WEIGHT = 30, (0.6, 1.0), 0.1


@dataclass(frozen=True)
class Grasp:
    """A pose of the open hand around an object.

    Args:
        position: of the grip site, ``[3]`` in metres.
        rotation: of the grip site, ``[3, 3]``.
        wrist_angle: of the finger axis from the arm's direction, in radians.
        tilt: of the fingertips away from the base, in radians.
    """

    position: np.ndarray
    rotation: np.ndarray
    wrist_angle: float
    tilt: float


@dataclass(frozen=True)
class _Candidates:
    """Grasps before the arm is asked: positions ``[n, 3]``, yaws of the finger axis ``[n]``, costs ``[n]``."""

    positions: np.ndarray
    yaws: np.ndarray
    costs: np.ndarray


def plan_grasp(
    arm: Arm,
    data: mujoco.MjData,
    points: np.ndarray,
    others: np.ndarray,
    *,
    approach: float,
    carry: np.ndarray,
    avoid: Sequence[np.ndarray] = (),
) -> Grasp:
    """Chooses how to grasp an object.

    Args:
        arm: the arm.
        data: current poses.
        points: collision points of the object, ``[n, 3]`` in metres.
        others: collision points of everything else, ``[m, 3]``.
        approach: height from which the hand comes down, in metres above the grasp.
        carry: displacement of the object that is to follow, ``[3]`` in metres.
        avoid: positions of the grip site that failed before, each ``[3]``.

    Returns:
        Grasp: the cheapest candidate.
    """
    centre, direction, long_half, short_half = minimum_area_rectangle(points[:, :2])
    if 2 * short_half > _LARGEST_WIDTH:
        knob = _knob(points)
        candidates = _rim_candidates(points) if knob is None else _knob_candidates(points, knob)
    else:
        candidates = _side_candidates(points, centre, direction, (long_half, short_half))
    for failed in avoid:
        candidates.costs[np.linalg.norm(candidates.positions - failed, axis=1) < _FAILED_RADIUS] += _FAILED
    return _choose(arm, data, candidates, _lowered(points, others), approach, carry)


def _rim_candidates(points: np.ndarray) -> _Candidates:
    """Grasps of a bowl's or plate's wall, one finger inside. Tilted bowls have a rim of uneven height."""
    centre = (points[:, :2].min(axis=0) + points[:, :2].max(axis=0)) / 2
    offsets = points[:, :2] - centre
    bearings = np.arctan2(offsets[:, 1], offsets[:, 0])
    bottom = points[:, 2].min()
    positions, yaws, costs = [], [], []
    for angle in np.arange(_RIM_ANGLES) * 2 * np.pi / _RIM_ANGLES:
        sector = np.cos(bearings - angle) > np.cos(_RIM_SECTOR)
        if not sector.any():
            continue
        outward = np.array([np.cos(angle), np.sin(angle)])
        top = points[sector, 2].max()
        radius = (offsets[sector & (points[:, 2] > top - _RIM_THICKNESS)] @ outward).max()
        for shift, depth in itertools.product(_RIM_SHIFTS, _RIM_DEPTHS):
            horizontal = centre + (radius - _RIM_INSET - shift) * outward
            positions.append([*horizontal, max(top - depth, bottom + _RIM_CLEARANCE)])
            yaws.append(angle)
            costs.append(_SHIFT * shift + _SHALLOW * (_RIM_DEPTHS[0] - depth))
    return _Candidates(np.array(positions), np.array(yaws), np.array(costs))


def _lowered(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the obstacles, with what is over the object moved down to the hand, which has to pass it on its way."""
    low, high = points.min(axis=0), points.max(axis=0)
    above = others[:, 2] > high[2] + _HAND_ABOVE
    if not ((others[:, :2] > low[:2]) & (others[:, :2] < high[:2]))[above].all(axis=1).any():
        return others
    lowered = others.copy()
    lowered[above, 2] = high[2] + _HAND_ABOVE
    return lowered


def _knob(points: np.ndarray) -> np.ndarray | None:
    """Return the part that a lid is lifted by: what stands out on top, in the middle, of something too wide."""
    top = points[:, 2].max()
    for height in _KNOB_HEIGHTS:
        knob = points[points[:, 2] > top - height]
        if np.ptp(knob[:, :2], axis=0).max() < _KNOB_WIDTH:
            return knob
    return None


def _knob_candidates(points: np.ndarray, knob: np.ndarray) -> _Candidates:
    """Grasps across a knob, the fingertips just above what carries it."""
    centre, direction, long_half, short_half = minimum_area_rectangle(knob[:, :2])
    candidates = _side_candidates(knob, centre, direction, (long_half, short_half))
    rest = points[points[:, 2] < knob[:, 2].min(), 2].max()
    candidates.positions[:, 2] = np.maximum(candidates.positions[:, 2], rest + _TIP)
    return candidates


def _side_candidates(
    points: np.ndarray, centre: np.ndarray, direction: float, halves: tuple[float, float]
) -> _Candidates:
    """Grasps across a side of a box, can or bottle."""
    bottom, top = points[:, 2].min(), points[:, 2].max()
    low = top - bottom < _LOW_HEIGHT
    height = bottom + min(_LOW_CLEARANCE, _LOW_FRACTION * (top - bottom)) if low else top - _SIDE_DEPTH
    parts = []
    for along, across, half, width in (
        (direction, direction + np.pi / 2, *halves),
        (direction + np.pi / 2, direction, *halves[::-1]),
    ):
        if 2 * width > _LARGEST_WIDTH:
            continue
        turn, fraction = (grid.ravel() for grid in np.meshgrid(_SIDE_TURNS, _SIDE_SHIFTS, indexing="ij"))
        shift = fraction * half
        horizontal = centre + shift[:, None] * np.array([np.cos(along), np.sin(along)])
        costs = _SHIFT * np.abs(shift) + _SKEW * np.abs(turn) + _WIDTH * 2 * width
        parts.append((np.column_stack([horizontal, np.full(len(shift), height)]), across + turn, costs))
    return _Candidates(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _choose(
    arm: Arm, data: mujoco.MjData, candidates: _Candidates, others: np.ndarray, approach: float, carry: np.ndarray
) -> Grasp:
    positions = np.repeat(candidates.positions, 2, axis=0)
    costs = np.repeat(candidates.costs, 2)
    yaws = (candidates.yaws[:, None] + np.array([0.0, np.pi])).ravel()
    azimuths = arm.azimuth(data, positions)
    current = arm.wrist_angle(data)
    turns = np.remainder(yaws - azimuths - current + np.pi, 2 * np.pi) - np.pi
    tilts = np.maximum(arm.reach_tilt(data, positions), arm.reach_tilt(data, positions + [0.0, 0.0, approach]))
    costs = costs + _TURN * np.abs(turns) + _TILT * tilts * np.abs(np.cos(yaws - azimuths))
    costs[np.abs(turns) > _LARGEST_WRIST_TURN] = np.inf

    def hits(index: int, obstacles: np.ndarray, displacement: np.ndarray) -> int:
        position = positions[index] + displacement
        azimuth = float(arm.azimuth(data, position))
        rotation = arm.hand_rotation(azimuth, current + turns[index], tilts[index])
        return _points_inside(arm, obstacles, position, rotation)

    centre = candidates.positions.mean(axis=0)
    usable = np.flatnonzero(np.isfinite(costs)).tolist()
    obstacles = _near(others, centre)
    best: list[int] = []
    for index in sorted(usable, key=costs.__getitem__):
        if len(best) == _RESCORED and costs[index] >= costs[best[-1]]:
            break  # hits only add to what this and all further ones cost
        costs[index] += _HIT * hits(index, obstacles, np.zeros(3))
        bisect.insort(best, index, key=costs.__getitem__)
        del best[_RESCORED:]
    for fraction in _CARRY_FRACTIONS:
        obstacles = _near(others, centre + fraction * carry)
        costs[best] += [_CARRY_WEIGHT * hits(index, obstacles, fraction * carry) for index in best]
    index = min(best, key=costs.__getitem__)
    wrist_angle = current + float(turns[index])
    rotation = arm.hand_rotation(float(azimuths[index]), wrist_angle, float(tilts[index]))
    return Grasp(positions[index], rotation, wrist_angle, float(tilts[index]))


def _near(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Points that a hand, which comes from above, could meet around an object, as columns ``[3, n]``."""
    offsets = points - centre
    near = (np.linalg.norm(offsets, axis=1) < _NEIGHBOURHOOD) & (offsets[:, 2] > -_BELOW)
    return np.ascontiguousarray(points[near].T)


def _points_inside(arm: Arm, points: np.ndarray, position: np.ndarray, rotation: np.ndarray) -> int:
    """How many points, columns of ``[3, n]``, the hand and its open fingers would touch."""
    local = rotation.T @ points - (rotation.T @ position)[:, None]
    local = local[:, np.abs(local[1]) < arm.half_thickness + _MARGIN]
    inside = [
        ((local > box.low[:, None] - _MARGIN) & (local < box.high[:, None] + _MARGIN)).all(axis=0) for box in arm.boxes
    ]
    return int(np.any(inside, axis=0).sum())
