"""Pictures of many simulation states with one render context."""

from __future__ import annotations

import weakref
from typing import Any

import mujoco
import numpy as np

from torchrl_vla.envs.rendering import make_gl_context
from torchrl_vla.envs.simulation.coarse_meshes import with_coarse_meshes
from torchrl_vla.envs.simulation.culling import FrustumCulling
from torchrl_vla.envs.simulation.model_cache import CompiledModel

__all__ = ["POSES", "SceneRenderer"]

#: Arrays of an ``mjData`` that a picture depends on.
POSES = ("geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir")

#: robosuite's limit of geoms in a scene.
_MAX_GEOMS = 1000
#: The last of MuJoCo's groups, which is not drawn by default.
_HIDDEN_GROUP = 5


class SceneRenderer:
    """Draws a compiled model from poses that were copied out of any ``mjData`` of it.

    Args:
        compiled: the model.
        image_size: height and width in pixels.
        exact: whether to draw as stock does. Otherwise anti-aliasing, mirrors and the smallest faces are left out,
            which take two thirds of the time, on a GPU as on a CPU.
    """

    def __init__(self, compiled: CompiledModel, image_size: int, *, exact: bool = True) -> None:
        self._compiled = compiled
        self._model = model = compiled.model
        self._size = image_size
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        self._gl = make_gl_context(image_size, image_size)
        self._gl.make_current()
        drawn = model if exact else with_coarse_meshes(model)
        quality = drawn.vis.quality
        samples, shadow_size = quality.offsamples, quality.shadowsize
        quality.offsamples = samples if exact else 0
        # LIBERO's lights cast no shadows, and an unused map of them takes 64 MB.
        quality.shadowsize = shadow_size if model.light_castshadow.any() else 0
        self._context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_150)
        quality.offsamples, quality.shadowsize = samples, shadow_size
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self.close = weakref.finalize(self, _free, self._gl, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = exact
        self._data = mujoco.MjData(model)
        self._targets = [getattr(self._data, name).reshape(-1) for name in POSES]
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0
        self._culling = FrustumCulling(model, self._options.geomgroup)
        self._groups = model.geom_group.copy()
        self._perturbation = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._viewport = mujoco.MjrRect(0, 0, image_size, image_size)

    def render(self, poses: np.ndarray, site_rgba: np.ndarray, camera: int) -> np.ndarray:
        """Draws one picture.

        Args:
            poses: the arrays of ``POSES``, flat and one after the other; what follows is ignored.
            site_rgba: ``[nsite, 4]`` colours of sites.
            camera: index of a camera of the model.

        Returns:
            np.ndarray: ``uint8 [H, W, 3]``, bottom row first as OpenGL has it.
        """
        start = 0
        for target in self._targets:
            target[:] = poses[start : start + target.size]
            start += target.size
        self._model.site_rgba[:] = site_rgba
        self._camera.fixedcamid = camera
        # Geoms of a hidden group are left out of the scene. The group means nothing to the physics.
        self._model.geom_group[self._culling.unseen(self._data, camera)] = _HIDDEN_GROUP
        mujoco.mjv_updateScene(
            self._model,
            self._data,
            self._options,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        self._model.geom_group[:] = self._groups
        # Another context of this process may be current: without this the wrong scene would be drawn.
        self._gl.make_current()
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        image = np.empty((self._size, self._size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, self._viewport, self._context)
        return image


def _free(gl: Any, context: mujoco.MjrContext) -> None:
    gl.make_current()
    context.free()
    gl.free()
