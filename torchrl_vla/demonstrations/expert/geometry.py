"""Rotations, and the collision surfaces of a MuJoCo model as points."""

from __future__ import annotations

import mujoco
import numpy as np

__all__ = ["CollisionPoints", "minimum_area_rectangle", "rotation_about", "rotation_vector", "yaw_rotation"]

#: Half-size in metres from which on a geom is taken for the floor or a table top rather than for an obstacle.
_GROUND_HALF_SIZE = 0.3


def yaw_rotation(angle: float) -> np.ndarray:
    """Rotation about the vertical, ``[3, 3]``.

    Args:
        angle: in radians.
    """
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix ``[3, 3]`` by Rodrigues' formula.

    Args:
        axis: unit vector ``[3]``.
        angle: in radians.
    """
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle of a rotation, ``[3]`` in radians, of length 0 to pi.

    Args:
        rotation: matrix ``[3, 3]``.
    """
    quaternion, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).reshape(9))
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def minimum_area_rectangle(points: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """Return the smallest rectangle around points of a plane, one of whose sides lies on their convex hull.

    Args:
        points: ``[n, 2]``.

    Returns:
        tuple: centre ``[2]``, direction of the long side in radians, half-length of the long side, of the short side.
    """
    from scipy.spatial import ConvexHull

    hull = points[ConvexHull(points).vertices]
    edges = np.diff(hull, axis=0, append=hull[:1])
    angles = np.arctan2(edges[:, 1], edges[:, 0])
    along = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    projections = np.stack([hull @ along.T, hull @ across.T])
    low, high = projections.min(axis=1), projections.max(axis=1)
    best = int(np.argmin(np.prod(high - low, axis=0)))
    middle, half = (low[:, best] + high[:, best]) / 2, (high[:, best] - low[:, best]) / 2
    centre = middle[0] * along[best] + middle[1] * across[best]
    if half[0] >= half[1]:
        return centre, float(angles[best]), float(half[0]), float(half[1])
    return centre, float(angles[best]) + np.pi / 2, float(half[1]), float(half[0])


class CollisionPoints:
    """Points on the bounding boxes of all geoms that can collide, but for the robot's, the floor's and table tops'.

    Args:
        model: the compiled model; only what does not change with fixtures' poses is read.
        robot: name of the robot's root body.
        spacing: largest distance of neighbouring points in metres.
    """

    def __init__(self, model: mujoco.MjModel, *, robot: str = "robot0_base", spacing: float = 0.01) -> None:
        robot_root = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, robot)
        geoms = np.flatnonzero((model.geom_contype != 0) | (model.geom_conaffinity != 0))
        geoms = geoms[model.body_rootid[model.geom_bodyid[geoms]] != robot_root]
        is_plane = model.geom_type[geoms] == mujoco.mjtGeom.mjGEOM_PLANE
        is_ground = is_plane | (np.sort(model.geom_aabb[geoms, 3:], axis=1)[:, 1] > _GROUND_HALF_SIZE)
        self._ground = geoms[is_ground]
        # A plane ends at its origin, however deep its bounding box.
        boxes = np.where(is_plane[:, None], 0.0, model.geom_aabb[geoms])
        self._ground_centre, self._ground_half = boxes[is_ground, :3], boxes[is_ground, 3:]
        points, owners = [], []
        for geom in geoms[~is_ground]:
            surface = model.geom_aabb[geom, :3] + _box_surface(model.geom_aabb[geom, 3:], spacing)
            points.append(surface)
            owners.append(np.full(len(surface), geom))
        self._points = np.concatenate(points)
        self._owners = np.concatenate(owners)
        self._bodies = model.geom_bodyid[self._owners]
        self._roots = model.body_rootid[self._bodies]

    def ground(self, data: mujoco.MjData) -> float:
        """Height of the floor, or of the table top, in metres.

        Args:
            data: current poses.
        """
        up = data.geom_xmat[self._ground].reshape(-1, 3, 3)[:, 2]  # the vertical, in each geom's frame
        above = (up * self._ground_centre + np.abs(up) * self._ground_half).sum(axis=1)
        return float((data.geom_xpos[self._ground, 2] + above).max())

    def part(self, data: mujoco.MjData, bodies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World positions of the points of some bodies, such as a drawer, and of everything else.

        Args:
            data: current poses.
            bodies: their indices.

        Returns:
            tuple: ``[n, 3]`` of the bodies and ``[m, 3]`` of all others, in metres.
        """
        return self._partition(data, np.isin(self._bodies, bodies))

    def split(self, data: mujoco.MjData, body: int) -> tuple[np.ndarray, np.ndarray]:
        """World positions of one object's points and of everything else's.

        Args:
            data: current poses.
            body: root body of the object.

        Returns:
            tuple: ``[n, 3]`` of the object and ``[m, 3]`` of the others, in metres.
        """
        return self._partition(data, self._roots == body)

    def pieces(self, data: mujoco.MjData, body: int) -> list[np.ndarray]:
        """World positions of one object's points, geom by geom, each ``[n, 3]`` in metres.

        Args:
            data: current poses.
            body: root body of the object.
        """
        own = self._roots == body
        return [self._partition(data, own & (self._owners == geom))[0] for geom in np.unique(self._owners[own])]

    def _partition(self, data: mujoco.MjData, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rotations = data.geom_xmat[self._owners].reshape(-1, 3, 3)
        world = data.geom_xpos[self._owners] + np.einsum("nij,nj->ni", rotations, self._points)
        return world[own], world[~own]


def _box_surface(half_size: np.ndarray, spacing: float) -> np.ndarray:
    """Grid on the faces of an axis-aligned box around the origin, ``[n, 3]``, corners included."""
    counts = np.ceil(2 * half_size / spacing).astype(int) + 1
    axes = [np.linspace(-half, half, count) for half, count in zip(half_size, counts, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return grid[(np.abs(grid) >= half_size - 1e-9).any(axis=1)]
