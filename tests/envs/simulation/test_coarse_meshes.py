"""Faces that collapse in the grid are left out; the model itself and the other faces stay."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from torchrl_vla.envs.simulation.coarse_meshes import with_coarse_meshes

pytestmark = pytest.mark.simulator

# A tetrahedron of 10 cm; vertex 4 is half a millimetre from vertex 1, and 1-4-2 a sliver.
_XML = """
<mujoco>
  <asset>
    <mesh name="a" inertia="shell" vertex="0 0 0  .1 0 0  0 .1 0  0 0 .1  .1 .0005 0"
      face="0 2 1  0 1 3  0 3 2  1 4 3  4 2 3  1 2 4"/>
    <mesh name="b" inertia="shell" vertex="0 0 0  .1 0 0  0 .1 0  0 0 .1" face="0 2 1  0 1 3  0 3 2  1 2 3"/>
    <mesh name="tiny" inertia="shell" vertex="0 0 0  .0005 0 0  0 .0005 0  0 0 .0005"
      face="0 2 1  0 1 3  0 3 2  1 2 3"/>
  </asset>
  <worldbody><geom type="mesh" mesh="a"/><geom type="mesh" mesh="b"/><geom type="mesh" mesh="tiny"/></worldbody>
</mujoco>
"""


def _triangles(model: mujoco.MjModel, mesh: int) -> np.ndarray:
    start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    vertices = model.mesh_vert[model.mesh_vertadr[mesh] :]
    return vertices[model.mesh_face[start : start + count]]


def test_slivers_go_and_the_rest_stays() -> None:
    model = mujoco.MjModel.from_xml_string(_XML)
    before, faces = [_triangles(model, mesh).copy() for mesh in range(3)], model.mesh_face.copy()
    coarse = with_coarse_meshes(model)
    assert np.array_equal(model.mesh_face, faces) and model.mesh_facenum.tolist() == [6, 4, 4]
    # The two faces with an edge from 1 to 4 go. A mesh smaller than the grid's cells stays as it was.
    assert coarse.mesh_facenum.tolist() == [4, 4, 4]
    assert all(np.array_equal(_triangles(coarse, mesh), before[mesh]) for mesh in (1, 2))
    edges = np.linalg.norm(before[0] - np.roll(before[0], 1, axis=1), axis=-1)
    kept = np.flatnonzero(edges.min(axis=1) > 1e-3)
    assert len(kept) == 4
    assert np.array_equal(coarse.mesh_facenormal[:4], model.mesh_facenormal[:6][kept])
    difference = np.abs(_triangles(coarse, 0) - before[0][kept]).max()
    assert 0 < difference < 6e-4
