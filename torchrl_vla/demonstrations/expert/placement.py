"""Where an object goes, how high it is carried there, and the hand's pose that brings it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.arm import Arm

__all__ = [
    "CarryPath",
    "clear_height",
    "free_place",
    "hand_pose_for",
    "leave_overhang",
    "plan_carry",
    "release_height",
]

_RELEASE_GAP = 0.008
_CARRY_CLEARANCE, _SIDE_CLEARANCE, _BLOCKED_WITHIN, _LOOK_AHEAD = 0.025, 0.015, 0.10, 0.03
#: How far from its way, in metres, the open hand and its fingers reach.
_HAND_RADIUS = 0.07
#: Of the hand along and across its finger axis, from the site, with some room; how far off nothing is in the way.
_HAND_LENGTH, _HAND_WIDTH, _ROOM = 0.12, 0.07, 0.2
#: How steeply the object climbs towards what is further ahead.
_CLIMB_SLOPE = 0.7


@dataclass(frozen=True)
class CarryPath:
    """Which heights an object must keep on a straight way.

    Args:
        along: where on the way the points near it are, ``[n]`` in metres.
        heights: of the object's origin that clears these points, ``[n]``.
        lowest: height that is enough where nothing is near.
        reach: how far ahead and behind the object is affected by a point.
        length: of the way.
        rise_first: whether something so near, or so tall, is in the way that the object goes straight up to begin with.
    """

    along: np.ndarray
    heights: np.ndarray
    lowest: float
    reach: float
    length: float
    rise_first: bool

    def height(self, travelled: float) -> float:
        """Height of the object's origin that clears what is near, and can clear in time what comes next, in metres.

        Args:
            travelled: part of the way that is behind it, in metres.
        """
        ahead = np.maximum(self.along - travelled - self.reach - _LOOK_AHEAD, 0.0)
        needed = (self.heights - _CLIMB_SLOPE * ahead)[self.along > travelled - self.reach]
        return float(needed.max(initial=self.lowest))


def release_height(
    points: np.ndarray, origin: np.ndarray, others: np.ndarray, target: np.ndarray, ground: float
) -> float:
    """Height of an object's origin at which to let go of it above what it is to stand on.

    Args:
        points: collision points of the object where it is now, ``[n, 3]`` in metres.
        origin: its origin there, ``[3]``.
        others: collision points of everything else, ``[m, 3]``.
        target: horizontal position that the origin is to have, ``[2]``.
        ground: height of the floor or table top.
    """
    bottom = points[:, 2].min()
    foot = points[points[:, 2] < bottom + 0.01, :2] - origin[:2]
    radius = np.linalg.norm(foot, axis=1).max()
    below = others[np.linalg.norm(others[:, :2] - target, axis=1) <= radius]
    support = max(ground, below[:, 2].max() if len(below) else -np.inf)
    return float(support + origin[2] - bottom + _RELEASE_GAP)


def plan_carry(
    points: np.ndarray, origin: np.ndarray, others: np.ndarray, target: np.ndarray, ground: float, lowest: float
) -> CarryPath:
    """Find what a carried object must clear.

    Args:
        points: collision points of the object where it is now, ``[n, 3]`` in metres.
        origin: its origin there, ``[3]``.
        others: collision points of everything else, ``[m, 3]``.
        target: horizontal position that the origin is to have, ``[2]``.
        ground: height of the floor or table top.
        lowest: height below which the origin is not carried.
    """
    bottom = points[:, 2].min()
    radius = np.linalg.norm(points[:, :2] - origin[:2], axis=1).max() + _SIDE_CLEARANCE
    path = target - origin[:2]
    length = max(float(np.linalg.norm(path)), 1e-9)
    along = (others[:, :2] - origin[:2]) @ path / length
    nearest = origin[:2] + np.clip(along, 0.0, length)[:, None] * path / length
    near = np.linalg.norm(others[:, :2] - nearest, axis=1) < radius
    lift = _CARRY_CLEARANCE + origin[2] - bottom
    close = (along < _BLOCKED_WITHIN) & (others[:, 2] > bottom - 0.005)
    steep = others[:, 2] + lift - origin[2] > along - radius  # more than 45 degrees
    in_the_way = near & (close | steep)
    return CarryPath(
        along[near], others[near, 2] + lift, max(lowest, ground + lift), radius, length, bool(in_the_way.any())
    )


def free_place(shape: np.ndarray, places: Sequence[np.ndarray], others: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Chooses where an object leaves most room: away from what stands there, its narrow side towards the centre.

    Args:
        shape: collision points of the object from its origin, as it will be turned, ``[n, 3]`` in metres.
        places: of its origin, each ``[3]``.
        others: collision points of what is in its way, ``[m, 3]``.
        centre: of the places, ``[3]``.
    """

    def cost(place: np.ndarray) -> float:
        near = others[np.linalg.norm(others[:, :2] - place[:2], axis=1) < _ROOM, :2]
        moved = shape[:, :2] + place[:2]
        low, high = moved.min(axis=0) - _SIDE_CLEARANCE, moved.max(axis=0) + _SIDE_CLEARANCE
        hits = int(((near > low) & (near < high)).all(axis=1).sum())
        towards = (centre - place)[:2] / np.linalg.norm((centre - place)[:2])
        return hits + float((shape[:, :2] @ towards).max())

    return min(places, key=cost)


def leave_overhang(
    points: np.ndarray, others: np.ndarray, origin: np.ndarray, rotation: np.ndarray, hand: np.ndarray
) -> np.ndarray:
    """Return the shortest level way for a held object, and the hand, from under what is above them, ``[3]`` in metres.

    Args:
        points: collision points of the object, ``[n, 3]`` in metres.
        others: collision points of everything else, ``[m, 3]``.
        origin: of the object, ``[3]``.
        rotation: of the hand, ``[3, 3]``.
        hand: position of the grip site, ``[3]``.

    Returns:
        Zeros where nothing is above the object.
    """
    above = others[others[:, 2] > points[:, 2].max(), :2]
    radius = float(np.linalg.norm(points[:, :2] - origin[:2], axis=1).max())
    if not (np.linalg.norm(above - origin[:2], axis=1) < radius).any():
        return np.zeros(3)
    fingers = rotation[:2, 0]
    for length in np.arange(0.02, 0.3, 0.02):
        for angle in np.arange(16) * np.pi / 8:
            way = length * np.array([np.cos(angle), np.sin(angle)])
            if (np.linalg.norm(above - origin[:2] - way, axis=1) < radius + _SIDE_CLEARANCE).any():
                continue
            from_hand = above - hand[:2] - way
            along = np.abs(from_hand @ fingers)
            across = np.abs(from_hand @ np.array([-fingers[1], fingers[0]]))
            if not ((along < _HAND_LENGTH) & (across < _HAND_WIDTH)).any():
                return np.array([*way, 0.0])
    return np.zeros(3)


def clear_height(start: np.ndarray, end: np.ndarray, others: np.ndarray) -> float:
    """Height at which the empty hand clears what stands in its straight way, in metres; -inf if nothing does.

    Args:
        start: where the grip site is, ``[3]`` in metres.
        end: where it is to be, ``[3]``.
        others: collision points, ``[m, 3]``.
    """
    path = end - start
    share = (others[:, :2] - start[:2]) @ path[:2] / max(float(path[:2] @ path[:2]), 1e-9)
    nearest = start + np.clip(share, 0.0, 1.0)[:, None] * path
    offset = others - nearest
    in_the_way = (np.linalg.norm(offset[:, :2], axis=1) < _HAND_RADIUS) & (offset[:, 2] > -_CARRY_CLEARANCE)
    return float(others[in_the_way, 2].max(initial=-np.inf) + _CARRY_CLEARANCE)


def hand_pose_for(
    arm: Arm, data: mujoco.MjData, origin: np.ndarray, held: np.ndarray, wrist_angle: float, climb: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pose of the grip site that brings a held object's origin somewhere.

    Args:
        arm: the arm.
        data: current poses.
        origin: where the object's origin is to be, ``[3]`` in metres.
        held: its origin in the frame of the grip site, ``[3]``.
        wrist_angle: of the finger axis from the arm's direction, in radians.
        climb: how far above that the arm must reach with the same orientation too, in metres.

    Returns:
        tuple: position ``[3]`` and rotation ``[3, 3]``.
    """
    position = origin
    for _ in range(3):
        tilt = max(float(arm.reach_tilt(data, position)), float(arm.reach_tilt(data, position + [0.0, 0.0, climb])))
        rotation = arm.hand_rotation(float(arm.azimuth(data, position)), wrist_angle, tilt)
        position = origin - rotation @ held
    return position, rotation
