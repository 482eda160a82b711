"""Short moves of the hand that every skill is made of."""

from __future__ import annotations

from collections.abc import Generator

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.arm import GRIPPER_OPEN, Arm
from torchrl_vla.demonstrations.expert.placement import clear_height

__all__ = ["Phase", "release", "rise", "straight", "travel"]

#: A phase yields actions and returns whether it went well.
Phase = Generator[np.ndarray, None, bool]

_NEAR, _NEAR_TURN, _HALF_TURN = 0.012, 0.12, 2.2
#: How much higher the hand passes over things since it turns on its way, in metres.
_TURNING = 0.05
_SHORT_STEPS, _RELEASE_STEPS, _TRAVEL_STEPS = 15, 8, 80


def straight(
    arm: Arm,
    data: mujoco.MjData,
    position: np.ndarray,
    rotation: np.ndarray,
    gripper: float,
    speed: float = 1.0,
    steps: int = _SHORT_STEPS,
) -> Phase:
    """Move straight to a pose that is near.

    Args:
        arm: the arm.
        data: the simulation, read anew before every action.
        position: of the grip site, ``[3]`` in metres.
        rotation: of the grip site, ``[3, 3]``.
        gripper: ``GRIPPER_OPEN`` or ``GRIPPER_CLOSE``.
        speed: length of the longest translation, up to 1.
        steps: after which it has failed.
    """
    for _ in range(steps):
        offset, _ = arm.offset(data, position, rotation)
        if np.linalg.norm(offset) < _NEAR:
            return True
        yield arm.towards(data, position, rotation, gripper, speed)
    return False


def release(arm: Arm, data: mujoco.MjData, rotation: np.ndarray) -> Generator[np.ndarray, None, None]:
    """Open the gripper where the hand is.

    Args:
        arm: the arm.
        data: the simulation.
        rotation: of the grip site, ``[3, 3]``.
    """
    here, _ = arm.pose(data)
    for _ in range(_RELEASE_STEPS):
        yield arm.towards(data, here, rotation, GRIPPER_OPEN)


def rise(arm: Arm, data: mujoco.MjData, height: float) -> Phase:
    """Move the open hand up, if it is not that high already.

    Args:
        arm: the arm.
        data: the simulation.
        height: of the grip site in metres.
    """
    position, rotation = arm.pose(data)
    position[2] = max(position[2], height)
    return (yield from straight(arm, data, position, rotation, GRIPPER_OPEN))


def travel(
    arm: Arm, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray, gripper: float, obstacles: np.ndarray
) -> Phase:
    """Move the empty hand to a pose, over what stands in its way.

    Args:
        arm: the arm.
        data: the simulation.
        position: of the grip site, ``[3]`` in metres.
        rotation: of the grip site, ``[3, 3]``.
        gripper: ``GRIPPER_OPEN`` or ``GRIPPER_CLOSE``.
        obstacles: collision points, ``[n, 3]``.
    """
    here, _ = arm.pose(data)
    clear = clear_height(here, position, obstacles) + _TURNING
    if clear > here[2]:
        yield from straight(arm, data, np.array([*here[:2], clear]), arm.pose(data)[1], gripper)
    for _ in range(_TRAVEL_STEPS):
        offset, turn = arm.offset(data, position, rotation)
        if np.linalg.norm(offset) < _NEAR and np.linalg.norm(turn) < _NEAR_TURN:
            return True
        # It comes down once it is above, and turned.
        far = np.linalg.norm(offset[:2]) > 2 * _NEAR or np.linalg.norm(turn) > 3 * _NEAR_TURN
        towards = np.array([*position[:2], max(position[2], clear)]) if far else position
        # Half a turn goes back over the wrist's rest, not on into its limit.
        by = arm.rest(data, position) if np.linalg.norm(turn) > _HALF_TURN else rotation
        yield arm.towards(data, towards, by, gripper)
    return False
