"""Actions as changes of the controller's goal."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from torchrl_vla.envs.simulation.compiled import compiled

__all__ = ["Goals", "goal_changes"]

#: Largest change of an action of 1 in one control step: metres, radians.
_TRANSLATION_SCALE, _ROTATION_SCALE = 0.05, 0.5


class Goals(NamedTuple):
    """Actions turned into changes of the controller's goal.

    Args:
        translation: ``[n, 3]`` metres.
        rotation: ``[n, 3, 3]`` rotation matrices, applied in the world frame.
        rotates: ``[n]`` bool, whether the goal orientation changes at all: it stays where it was when not.
        gripper: ``[n]`` sign of the gripper action.
    """

    translation: np.ndarray
    rotation: np.ndarray
    rotates: np.ndarray
    gripper: np.ndarray


@compiled
def _rotation(quat):  # type: ignore[no-untyped-def]
    """Rotation matrix of a quaternion (x, y, z, w), in single precision as stock computes it."""
    q = quat.astype(np.float32)[np.array([3, 0, 1, 2])]
    q *= math.sqrt(2.0 / np.dot(q, q))
    w, x, y, z = q[0], q[1], q[2], q[3]
    matrix = np.empty((3, 3))
    matrix[0, 0], matrix[0, 1], matrix[0, 2] = 1.0 - y * y - z * z, x * y - z * w, x * z + y * w
    matrix[1, 0], matrix[1, 1], matrix[1, 2] = x * y + z * w, 1.0 - x * x - z * z, y * z - x * w
    matrix[2, 0], matrix[2, 1], matrix[2, 2] = x * z - y * w, y * z + x * w, 1.0 - x * x - y * y
    return matrix


def goal_changes(actions: np.ndarray) -> Goals:
    """Turn actions into changes of the controller's goal; components outside [-1, 1] are clipped as stock does.

    The sines are NumPy's and not the compiled loop's, which may round the last bit otherwise.

    Args:
        actions: ``float64 [n, 7]``: translation, rotation as a scaled axis, gripper.

    Returns:
        Goals: of the ``n`` control steps.

    Examples:
        >>> goals = goal_changes(np.array([[2.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.3]]))
        >>> goals.translation[0].tolist(), bool(goals.rotates[0]), float(goals.gripper[0])
        ([0.05, 0.0, 0.0], False, -1.0)
    """
    clipped = np.clip(actions[:, :6], -1.0, 1.0)
    translation = clipped[:, :3] * _TRANSLATION_SCALE
    axes = clipped[:, 3:] * _ROTATION_SCALE
    rotates = axes.any(axis=1)
    rotation = np.tile(np.eye(3), (len(actions), 1, 1))
    for i in np.flatnonzero(rotates):
        angle = np.linalg.norm(axes[i])
        if angle != 0.0:
            rotation[i] = _rotation(np.append(axes[i] / angle * np.sin(angle / 2.0), np.cos(angle / 2.0)))
    return Goals(translation, rotation, rotates, np.sign(actions[:, 6]))
