"""The Panda arm and its gripper: poses that it can reach, what its fingers touch, actions that move it."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.geometry import rotation_about, rotation_vector
from torchrl_vla.errors import UserError

__all__ = ["Arm", "GRIPPER_CLOSE", "GRIPPER_OPEN", "HandBox"]

GRIPPER_OPEN, GRIPPER_CLOSE = -1.0, 1.0

#: What a full action moves the controller's goal by: metres and radians.
_POSITION_RANGE, _ROTATION_RANGE = 0.05, 0.5
_POSITION_GAIN, _ROTATION_GAIN = 2.0, 1.5
#: Seconds for which the hand goes on at its velocity when told to stop; a stretched arm overshoots without this.
_LAG = 0.05
#: Panda's kinematics in metres: shoulder above link 0, grip site below the wrist, flange outside the wrist.
_SHOULDER_HEIGHT, _WRIST_TO_SITE, _WRIST_OFFSET = 0.333, 0.21, 0.088
#: Distance of wrist and shoulder from which on the elbow is almost stretched (it ends at 0.719).
_REACH = 0.645
#: Horizontal distance of wrist and shoulder up to which the arm is folded too tightly to push.
_FOLDED = 0.40
#: Opposite corners of boxes around the flange, the hand, and the two fingers when they are open.
_SOLID = np.array(
    [
        [[-0.055, -0.055, -0.25], [0.055, 0.055, -0.124]],
        [[-0.105, -0.032, -0.124], [0.105, 0.032, -0.026]],
        [[0.038, -0.011, -0.049], [0.068, 0.011, 0.0125]],
        [[-0.068, -0.011, -0.049], [-0.038, 0.011, 0.0125]],
    ]
)
#: Angle in radians from pointing down, fingers across the arm's direction, that the wrist's joints always allow.
_EASY_TURN = 1.5
_TILTS = np.radians(np.arange(0.0, 41.0, 2.0))


@dataclass(frozen=True)
class HandBox:
    """A box around a part of the open gripper, in the frame of the grip site (x: finger axis, z: approach).

    Args:
        low, high: opposite corners ``[3]`` in metres.
    """

    low: np.ndarray
    high: np.ndarray


class Arm:
    """Reads and steers one Panda of a MuJoCo model.

    Args:
        model: the compiled model.
        robot, gripper: what the names of the arm's and the gripper's parts start with.
    """

    def __init__(self, model: mujoco.MjModel, *, robot: str = "robot0", gripper: str = "gripper0") -> None:
        self._model = model
        self._site = _index(model, mujoco.mjtObj.mjOBJ_SITE, f"{gripper}_grip_site")
        self._base = _index(model, mujoco.mjtObj.mjOBJ_BODY, f"{robot}_link0")
        self._geom_root = model.body_rootid[model.geom_bodyid]
        self._finger = np.zeros(model.ngeom, dtype=int)
        for number, side in enumerate(("left", "right"), start=1):
            finger = _index(model, mujoco.mjtObj.mjOBJ_BODY, f"{gripper}_{side}finger")
            bodies = np.flatnonzero((np.arange(model.nbody) == finger) | (model.body_parentid == finger))
            self._finger[np.isin(model.geom_bodyid, bodies)] = number
        #: The hand from 31 mm above the site on, and what the fingers sweep: their tips reach 9 mm beyond the site.
        self.boxes = (
            HandBox(np.array([-0.105, -0.035, -0.14]), np.array([0.105, 0.035, -0.031])),
            HandBox(np.array([-0.062, -0.011, -0.031]), np.array([0.062, 0.011, 0.009])),
        )
        #: Of the boxes, across the finger axis, in metres.
        self.half_thickness = max(float(box.high[1]) for box in self.boxes)

    def pose(self, data: mujoco.MjData) -> tuple[np.ndarray, np.ndarray]:
        """Position ``[3]`` in metres and rotation ``[3, 3]`` of the grip site.

        Args:
            data: current poses.
        """
        return data.site_xpos[self._site].copy(), data.site_xmat[self._site].reshape(3, 3).copy()

    def azimuth(self, data: mujoco.MjData, position: np.ndarray) -> np.ndarray:
        """Direction of positions as the arm's base sees them, ``[*]`` in radians.

        Args:
            data: current poses.
            position: ``[*, 3]`` in metres.
        """
        offset = position - data.xpos[self._base]
        return np.arctan2(offset[..., 1], offset[..., 0])

    def wrist_angle(self, data: mujoco.MjData) -> float:
        """Angle of the finger axis about the vertical, from the direction that the arm points to, in radians.

        Args:
            data: current poses.
        """
        position, rotation = self.pose(data)
        return float(np.arctan2(rotation[1, 0], rotation[0, 0]) - self.azimuth(data, position))

    def reach_tilt(self, data: mujoco.MjData, position: np.ndarray) -> np.ndarray:
        """Return the smallest outward tilt of the hand at which the elbow stays bent, ``[*]`` in radians.

        Args:
            data: current poses.
            position: where the grip site is to be, ``[*, 3]`` in metres.
        """
        offset = position - data.xpos[self._base]
        radius, height = np.linalg.norm(offset[..., :2], axis=-1), offset[..., 2] - _SHOULDER_HEIGHT
        sine, cosine = np.sin(_TILTS), np.cos(_TILTS)
        wrist_radius = radius[..., None] - _WRIST_TO_SITE * sine - _WRIST_OFFSET * cosine
        wrist_height = height[..., None] + _WRIST_TO_SITE * cosine - _WRIST_OFFSET * sine
        distance = np.hypot(wrist_radius, wrist_height)
        within = distance <= _REACH
        choice = np.where(within.any(axis=-1), within.argmax(axis=-1), distance.argmin(axis=-1))
        return _TILTS[choice]

    def hand_rotation(self, azimuth: float, wrist_angle: float, tilt: float) -> np.ndarray:
        """Rotation ``[3, 3]`` of a hand that points down, its fingertips tilted away from the base.

        Args:
            azimuth: direction of the arm in radians.
            wrist_angle: angle of the finger axis about the vertical, from that direction, in radians.
            tilt: in radians.
        """
        yaw = azimuth + wrist_angle
        cosine, sine = np.cos(yaw), np.sin(yaw)
        upright = np.array([[cosine, sine, 0.0], [sine, -cosine, 0.0], [0.0, 0.0, -1.0]])
        return rotation_about(np.array([np.sin(azimuth), -np.cos(azimuth), 0.0]), tilt) @ upright

    def fingers_touching(self, data: mujoco.MjData, body: int) -> int:
        """How many of the two fingers touch an object.

        Args:
            data: current contacts.
            body: root body of the object.
        """
        pairs = data.contact.geom
        touched = set()
        for first, second in ((0, 1), (1, 0)):
            on_object = self._geom_root[pairs[:, second]] == body
            touched.update(self._finger[pairs[on_object, first]].tolist())
        return len(touched - {0})

    def hits(self, points: np.ndarray, position: np.ndarray, rotation: np.ndarray, margin: float = 0.002) -> int:
        """How many points the flange, the hand and its open fingers would touch, what is between the fingers not.

        Args:
            points: columns of ``[3, n]`` in metres.
            position: of the grip site, ``[3]`` in metres.
            rotation: of the grip site, ``[3, 3]``.
            margin: around them, in metres.
        """
        local = rotation.T @ points - (rotation.T @ position)[:, None]
        low, high = _SOLID[:, 0, :, None] - margin, _SOLID[:, 1, :, None] + margin
        return int(((local > low) & (local < high)).all(axis=1).any(axis=0).sum())

    def lowest(self, position: np.ndarray, rotation: np.ndarray) -> float:
        """Height of the lowest corner of the hand and its open fingers, in metres.

        Args:
            position: of the grip site, ``[3]`` in metres.
            rotation: of the grip site, ``[3, 3]``.
        """
        corners = np.where(rotation[2] > 0, _SOLID[:, 0], _SOLID[:, 1])
        return float(position[2] + (corners @ rotation[2]).min())

    def rest(self, data: mujoco.MjData, position: np.ndarray) -> np.ndarray:
        """Rotation ``[3, 3]`` of a hand that points down with the wrist in the middle of its range.

        Args:
            data: current poses.
            position: of the grip site, ``[3]`` in metres.
        """
        return self.hand_rotation(float(self.azimuth(data, position)), np.pi / 2, 0.0)

    def turn_from_rest(self, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray) -> float:
        """Angle in radians from a hand that points down, the fingers across the arm's direction.

        Args:
            data: current poses.
            position: of the grip site, ``[3]`` in metres.
            rotation: of the grip site, ``[3, 3]``.
        """
        return float(np.linalg.norm(rotation_vector(rotation @ self.rest(data, position).T)))

    def turn(self, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray) -> float:
        """Return what it takes to turn the hand: radians, and twice those beyond what the wrist does easily.

        Args:
            data: current poses.
            position: of the grip site, ``[3]`` in metres.
            rotation: of the grip site, ``[3, 3]``.
        """
        here = float(np.linalg.norm(self.offset(data, position, rotation)[1]))
        return here + 2.0 * max(0.0, self.turn_from_rest(data, position, rotation) - _EASY_TURN)

    def strain(self, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray) -> float:
        """By how much a pose asks the arm to stretch too far or to fold too near to its base, in metres.

        Args:
            data: current poses.
            position: of the grip site, ``[3]`` in metres.
            rotation: of the grip site, ``[3, 3]``.
        """
        shoulder = data.xpos[self._base] + [0.0, 0.0, _SHOULDER_HEIGHT]
        wrist = position - _WRIST_TO_SITE * rotation[:, 2] - shoulder
        flat = float(np.linalg.norm(wrist[:2]))
        stretched = float(np.hypot(flat - _WRIST_OFFSET, wrist[2])) - _REACH
        return max(0.0, stretched, _FOLDED - flat)

    def offset(self, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what is left to a pose once the present motion has died down.

        Args:
            data: current poses and velocities.
            position: ``[3]`` in metres.
            rotation: ``[3, 3]``.

        Returns:
            tuple: translation ``[3]`` in metres and rotation vector ``[3]`` in radians.
        """
        here, orientation = self.pose(data)
        velocity = np.empty(6)
        mujoco.mj_objectVelocity(self._model, data, mujoco.mjtObj.mjOBJ_SITE, self._site, velocity, 0)
        return position - here - _LAG * velocity[3:], rotation_vector(rotation @ orientation.T)

    def towards(
        self, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray, gripper: float, speed: float = 1.0
    ) -> np.ndarray:
        """Return the action ``[7]`` that moves the grip site towards a pose.

        Args:
            data: current poses.
            position: ``[3]`` in metres.
            rotation: ``[3, 3]``.
            gripper: ``GRIPPER_OPEN`` or ``GRIPPER_CLOSE``.
            speed: length of the longest translation, up to 1.
        """
        translation, turning = self.offset(data, position, rotation)
        move = _POSITION_GAIN * translation / _POSITION_RANGE
        turn = _ROTATION_GAIN * turning / _ROTATION_RANGE
        return np.concatenate([_limit(move, speed), _limit(turn, 1.0), [gripper]])


def _limit(vector: np.ndarray, largest: float) -> np.ndarray:
    """Shortens a vector, keeping its direction, until no component exceeds a limit."""
    return vector * min(1.0, largest / max(np.abs(vector).max(), 1e-12))


def _index(model: mujoco.MjModel, kind: mujoco.mjtObj, name: str) -> int:
    index = mujoco.mj_name2id(model, kind, name)
    if index < 0:
        raise UserError(f"The model has no {name!r}: the expert knows LIBERO's scenes with one Panda and its gripper.")
    return index
