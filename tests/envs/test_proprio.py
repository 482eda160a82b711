"""The two formats of the robot's state, against poses worked out by hand."""

import math

import numpy as np
import pytest

from torchrl_vla.envs.proprio import axis_angle_state, quaternion_state


def _low_dim(quaternion_xyzw: tuple[float, ...]) -> dict[str, np.ndarray]:
    return {
        "robot0_eef_pos": np.array([0.1, -0.2, 1.3]),
        "robot0_eef_quat": np.array(quaternion_xyzw),
        "robot0_gripper_qpos": np.array([0.03, -0.01]),
    }


@pytest.mark.parametrize(
    ("quaternion", "rotation"),
    [
        ((0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0)),
        ((math.sin(0.3), 0.0, 0.0, math.cos(0.3)), (0.6, 0.0, 0.0)),
        ((0.0, -math.sqrt(0.5), 0.0, math.sqrt(0.5)), (0.0, -math.pi / 2, 0.0)),
        # More than half a turn stays more than half a turn, as in OpenVLA-OFT.
        ((0.0, 0.0, math.sin(1.9), math.cos(1.9)), (0.0, 0.0, 3.8)),
        # Rounding may leave a component above 1.
        ((0.0, 0.0, 0.0, 1.0 + 1e-9), (0.0, 0.0, 0.0)),
    ],
)
def test_axis_angle(quaternion: tuple[float, ...], rotation: tuple[float, ...]) -> None:
    expected = [0.1, -0.2, 1.3, *rotation, 0.03, -0.01]
    assert axis_angle_state(_low_dim(quaternion)) == pytest.approx(expected, abs=1e-12)


def test_quaternion_has_w_first_and_the_opening_as_a_share() -> None:
    expected = [0.1, -0.2, 1.3, 0.8, 0.0, 0.6, 0.0, 0.5]
    assert quaternion_state(_low_dim((0.0, 0.6, 0.0, 0.8))) == pytest.approx(expected)
