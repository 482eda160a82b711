"""Meshes with fewer faces, for pictures that need not be stock's to the bit."""

from __future__ import annotations

import copy

import mujoco
import numpy as np

__all__ = ["with_coarse_meshes"]

#: Vertices this close, in metres, become one: less than a pixel of 256 at the distance of the agentview camera.
_CELL = 2e-3


def with_coarse_meshes(model: mujoco.MjModel) -> mujoco.MjModel:
    """Copy a model for drawing, without the faces that are too small to matter.

    LIBERO's scanned objects have several faces per pixel. Vertices are clustered in a grid (J. Rossignac and P. Borrel,
    "Multi-resolution 3D approximations for rendering complex scenes", 1993), each cluster is drawn at one of its
    vertices, and faces that have collapsed are left out. Those that remain keep their normals and textures.

    Args:
        model: the compiled model, not changed.

    Returns:
        MjModel: a copy in which each mesh has fewer faces, at least one.
    """
    coarse = copy.copy(model)
    for mesh in range(model.nmesh):
        vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
        start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        faces = model.mesh_face[start : start + count]
        cells = np.round(vertices / _CELL).astype(np.int64)
        cells -= cells.min(axis=0)
        numbers = np.ravel_multi_index(tuple(cells.T), tuple(cells.max(axis=0) + 1))
        _, chosen, cluster = np.unique(numbers, return_index=True, return_inverse=True)
        faces = chosen[cluster][faces]
        area = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
        kept = int(area.sum())
        if kept == 0:
            continue
        coarse.mesh_face[start : start + kept] = faces[area]
        for name in ("mesh_facenormal", "mesh_facetexcoord"):
            getattr(coarse, name)[start : start + kept] = getattr(model, name)[start : start + count][area]
        coarse.mesh_facenum[mesh] = kept
    return coarse
