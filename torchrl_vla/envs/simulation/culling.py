"""Finding geoms that cannot be seen, to leave them out of a picture without changing it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import mujoco
import numpy as np

__all__ = ["FrustumCulling"]

#: Added to every box on all sides, in metres: far more than rounding, far less than what matters for speed.
_MARGIN = 1e-3
_CORNERS = np.array(list(itertools.product((-1, 1), repeat=3)))


class FrustumCulling:
    """Tells which meshes and mirrors a camera sees, itself or in a mirror, by their bounding boxes.

    A picture's cost on the CPU is that of its vertices, twice where something mirrors, and MuJoCo draws what is behind
    the camera too. A geom that is reported as unseen has no fragment in the picture, so that leaving it out changes no
    pixel.

    Args:
        model: the compiled model; nothing is left out of one whose lights cast shadows. Pictures are square.
        groups: ``[6]`` which of MuJoCo's groups of geoms are drawn.
    """

    def __init__(self, model: mujoco.MjModel, groups: Sequence[int]) -> None:
        drawn = np.asarray(groups, dtype=bool)[model.geom_group]
        material = model.geom_matid
        flat = np.isin(model.geom_type, (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX))
        mirrors = drawn & flat & (material >= 0) & (model.mat_reflectance[material] > 0)
        self._mirrors = np.flatnonzero(mirrors)
        self._is_box = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
        self._size = model.geom_size
        candidates = drawn & (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH) | (mirrors & self._is_box)
        if model.light_castshadow.any():
            candidates[:] = False
        self._candidates = np.flatnonzero(candidates)
        boxes = model.geom_aabb[self._candidates, None]
        self._corners = boxes[..., :3] + _CORNERS * (boxes[..., 3:] + _MARGIN)
        self._half_angle = np.radians(model.cam_fovy) / 2

    def unseen(self, data: mujoco.MjData, camera: int) -> np.ndarray:
        """Return which geoms may be left out, ``bool [ngeom]``.

        Args:
            data: poses of geoms and cameras.
            camera: index of the camera.
        """
        eye, centres = data.cam_xpos[camera], data.geom_xpos
        frustum = self._frustum(data.cam_xmat[camera].reshape(3, 3), self._half_angle[camera])
        rotations = data.geom_xmat[self._candidates].reshape(-1, 3, 3)
        corners = self._corners @ rotations.transpose(0, 2, 1) + centres[self._candidates, None]
        unseen = np.zeros(len(centres), dtype=bool)
        unseen[self._candidates] = self._outside(corners, eye, frustum)
        for mirror in self._mirrors:
            if unseen[mirror]:
                continue
            matrix = data.geom_xmat[mirror].reshape(3, 3)
            normal = matrix[:, 2]
            height = self._size[mirror, 2] if self._is_box[mirror] else 0.0
            point = centres[mirror] + height * normal
            if (eye - point) @ normal < 0:
                continue  # nothing mirrors from behind
            images = corners - 2 * ((corners - point) @ normal)[..., None] * normal
            beam = self._beam(eye, point, matrix, self._size[mirror]) if self._is_box[mirror] else frustum
            unseen[self._candidates] &= self._outside(images, eye, beam)
            unseen[mirror] = False
        return unseen

    @staticmethod
    def _outside(corners: np.ndarray, eye: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Whether boxes of corners ``[n, 8, 3]`` are beyond a plane through the eye, of outward normals ``[k, 3]``."""
        return ((corners - eye) @ normals.T > 0).all(axis=1).any(axis=1)

    @staticmethod
    def _frustum(matrix: np.ndarray, half_angle: float) -> np.ndarray:
        """Outward normals ``[4, 3]`` of the sides of a camera's view; it looks along its negative z axis."""
        cosine, sine = math.cos(half_angle), math.sin(half_angle)
        sides = np.array([[cosine, 0, sine], [-cosine, 0, sine], [0, cosine, sine], [0, -cosine, sine]])
        return sides @ matrix.T

    @staticmethod
    def _beam(eye: np.ndarray, centre: np.ndarray, matrix: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Outward normals ``[4, 3]`` of the pyramid from the eye over the upper face of a box."""
        corners = np.array([[1, 1, 0], [-1, 1, 0], [-1, -1, 0], [1, -1, 0]]) * size @ matrix.T + centre - eye
        normals = np.cross(corners, np.roll(corners, -1, axis=0))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        return np.where((normals @ (centre - eye))[:, None] > 0, -normals, normals)
