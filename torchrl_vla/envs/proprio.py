"""The robot's state as policies read it: eight numbers, in the two formats in use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

__all__ = ["PROPRIO_FORMATS", "axis_angle_state", "quaternion_state"]

# Each of the Panda gripper's two fingers travels 0.04 m, in opposite directions.
_GRIPPER_TRAVEL = 0.08


def axis_angle_state(low_dim: Mapping[str, np.ndarray]) -> np.ndarray:
    """End effector position (3, m), axis-angle (3, rad) and finger positions (2, m): OpenVLA-OFT's format.

    Args:
        low_dim: ``robot0_eef_pos [3]``, ``robot0_eef_quat [4]`` (x, y, z, w) and ``robot0_gripper_qpos [2]``.

    Returns:
        np.ndarray: ``float64 [8]``.

    Examples:
        >>> half_turn_about_z = {"robot0_eef_pos": np.zeros(3), "robot0_eef_quat": np.array([0.0, 0.0, 1.0, 0.0]),
        ...                      "robot0_gripper_qpos": np.zeros(2)}
        >>> axis_angle_state(half_turn_about_z)[3:6].round(4).tolist()
        [0.0, 0.0, 3.1416]
    """
    x, y, z, w = low_dim["robot0_eef_quat"]
    w = min(max(w, -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    # Without a rotation there is no axis. The order of operations is OpenVLA-OFT's, for the same last bit.
    rotation = [axis * 2.0 * math.acos(w) / sine if sine else 0.0 for axis in (x, y, z)]
    return np.array([*low_dim["robot0_eef_pos"], *rotation, *low_dim["robot0_gripper_qpos"]])


def quaternion_state(low_dim: Mapping[str, np.ndarray]) -> np.ndarray:
    """End effector position (3, m), quaternion (4: w, x, y, z) and gripper opening (1, 0 closed to 1 open).

    Args:
        low_dim: ``robot0_eef_pos [3]``, ``robot0_eef_quat [4]`` (x, y, z, w) and ``robot0_gripper_qpos [2]``.

    Returns:
        np.ndarray: ``float64 [8]``.
    """
    x, y, z, w = low_dim["robot0_eef_quat"]
    left, right = low_dim["robot0_gripper_qpos"]
    return np.array([*low_dim["robot0_eef_pos"], w, x, y, z, (left - right) / _GRIPPER_TRAVEL])


#: How ``LiberoEnv`` writes ``("observation", "state")``, by name.
PROPRIO_FORMATS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "axis_angle": axis_angle_state,
    "quaternion": quaternion_state,
}
