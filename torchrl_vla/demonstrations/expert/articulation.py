"""Joints of drawers, doors and knobs: which one a goal is about, how far it is, where it takes what holds it."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.geometry import rotation_about

__all__ = ["Articulation", "find_articulation"]

#: A hinged part whose middle is this near to its axis, in metres, turns on the spot: a knob and not a door.
_KNOB_RADIUS = 0.03


@dataclass(frozen=True)
class Articulation:
    """A joint that an object's part slides or turns on.

    LIBERO's drawers, doors and knobs are closed, or off, at 0, and open, or on, towards the far end of their range.

    Args:
        model: the compiled model.
        joint: index of the slide or hinge.
        bodies: what it moves, ``[n]`` indices.
        root: root body of the object.
    """

    model: mujoco.MjModel
    joint: int
    bodies: np.ndarray
    root: int

    @property
    def slides(self) -> bool:
        """Whether it is a slide, and no hinge."""
        return bool(self.model.jnt_type[self.joint] == mujoco.mjtJoint.mjJNT_SLIDE)

    @property
    def opened(self) -> float:
        """Value at the open end of the range, in metres or radians."""
        return float(max(self.model.jnt_range[self.joint], key=abs))

    @property
    def closed(self) -> float:
        """Value at the closed end of the range, at 0 or just beyond it."""
        return float(min(self.model.jnt_range[self.joint], key=abs))

    def value(self, data: mujoco.MjData) -> float:
        """Where the joint is, in metres or radians."""
        return float(data.qpos[self.model.jnt_qposadr[self.joint]])

    def opening(self, data: mujoco.MjData) -> float:
        """Share of the range by which it is open: 1 at the end, below 0 where it is pressed shut."""
        return self.value(data) / self.opened

    def is_knob(self, data: mujoco.MjData, points: np.ndarray) -> bool:
        """Whether the part turns on the spot.

        Args:
            data: current poses.
            points: of the part, ``[n, 3]`` in metres.
        """
        axis = data.xaxis[self.joint]
        offset = (points.min(axis=0) + points.max(axis=0)) / 2 - data.xanchor[self.joint]
        return not self.slides and bool(np.linalg.norm(offset - axis * (axis @ offset)) < _KNOB_RADIUS)

    def outward(self, data: mujoco.MjData, point: np.ndarray) -> np.ndarray:
        """Direction ``[3]`` in which a point of the part moves when it is opened.

        Args:
            data: current poses.
            point: ``[3]`` in metres.
        """
        axis = data.xaxis[self.joint] * np.sign(self.opened)
        direction = axis if self.slides else np.cross(axis, point - data.xanchor[self.joint])
        return direction / max(float(np.linalg.norm(direction)), 1e-9)

    def arm_length(self, data: mujoco.MjData, point: np.ndarray) -> float:
        """Metres by which a point of the part moves per unit of the joint.

        Args:
            data: current poses.
            point: ``[3]`` in metres.
        """
        if self.slides:
            return 1.0
        return float(np.linalg.norm(np.cross(data.xaxis[self.joint], point - data.xanchor[self.joint])))

    def carried(
        self, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray, change: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where a pose that is fixed to the part is once the joint has moved.

        Args:
            data: current poses.
            position: now, ``[3]`` in metres.
            rotation: now, ``[3, 3]``.
            change: of the joint's value, in metres or radians.
        """
        axis, anchor = data.xaxis[self.joint], data.xanchor[self.joint]
        if self.slides:
            return position + change * axis, rotation
        turn = rotation_about(axis, change)
        return anchor + turn @ (position - anchor), turn @ rotation


def find_articulation(model: mujoco.MjModel, name: str) -> Articulation | None:
    """Find the drawer, door or knob that a site or an object stands for.

    Args:
        model: the compiled model.
        name: a site, such as a drawer's region, or an object.

    Returns:
        The joint of the site's own part; else the first one of its object; None where nothing moves.
    """
    site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, name)
    body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, f"{name}_main")
    body = int(model.site_bodyid[site]) if site >= 0 else body
    if body < 0:
        return None
    root = int(model.body_rootid[body])
    moving = np.isin(model.jnt_type, (mujoco.mjtJoint.mjJNT_SLIDE, mujoco.mjtJoint.mjJNT_HINGE))
    own = np.flatnonzero(moving & (model.jnt_bodyid == body))
    of_object = np.flatnonzero(moving & (model.body_rootid[model.jnt_bodyid] == root))
    # A stove's burner lies still: what is put on it does not ask for the stove's knob.
    candidates = own if len(own) else of_object
    if not len(candidates) or root == 0:
        return None
    joint = int(candidates[0])
    bodies = [int(model.jnt_bodyid[joint])]
    for child in range(bodies[0] + 1, model.nbody):
        if model.body_parentid[child] in bodies:
            bodies.append(child)
    return Articulation(model, joint, np.array(bodies), root)
