"""One episode's place in the simulator, and the task that it runs."""

from __future__ import annotations

import mujoco
import numpy as np

from torchrl_vla.envs.simulation.control import ArmState, DataViews, Robot, hide_sleeping, wake
from torchrl_vla.envs.simulation.model_cache import CompiledModel
from torchrl_vla.envs.simulation.scene import Scene
from torchrl_vla.envs.simulation.scene_renderer import POSES
from torchrl_vla.envs.simulation.sleeping import find_still, make_sleep, make_trees, put_to_sleep
from torchrl_vla.envs.simulation.success import GoalChecker

__all__ = ["SAMPLED", "Slot", "Task"]

#: What observations are made of, sampled at stock's time: first what pictures need.
SAMPLED = (*POSES, "xpos", "xquat", "qpos", "qvel")
_STATE = ("qpos", "qvel", "ctrl", "qacc_warmstart")


class Task:
    """A task's scene with what is derived from it, and the states that its episodes start from."""

    def __init__(self, key: str, scene: Scene, compiled: CompiledModel, init_states: np.ndarray) -> None:
        self.key = key
        self.scene = scene
        self.compiled = compiled
        self.init_states = init_states
        self.robot = Robot(**{name: scene.arrays[name] for name in Robot._fields})
        self.trees = make_trees(compiled.model, self.robot.arm_qvel[0])
        self.succeeded = GoalChecker(scene, compiled.model.ngeom)

    def place_fixtures(self) -> None:
        """Put the fixtures where this task has them, if another task of the same model ran last."""
        if self.compiled.placed_for is not self.scene:
            self.compiled.model.body_pos[:] = self.scene.arrays["body_pos"]
            self.compiled.model.body_quat[:] = self.scene.arrays["body_quat"]
            self.compiled.placed_for = self.scene


class Slot:
    """One episode's data and controller."""

    def __init__(self, task: Task) -> None:
        model = task.compiled.model
        self.task = task
        self.data = data = mujoco.MjData(model)
        self.arm = ArmState(**{name: task.scene.arrays[name].copy() for name in ArmState._fields})
        self.views = DataViews(
            *(data.qpos, data.qvel, data.ctrl, data.qM, data.qfrc_bias),
            *(data.site_xpos, data.site_xmat, data.geom_xpos, data.geom_xmat),
        )
        self.sleep = make_sleep(model)
        self.sampled = tuple(getattr(data, name).reshape(-1) for name in SAMPLED)
        self.sample = np.zeros(sum(array.size for array in self.sampled))
        self.site_rgba = model.site_rgba.copy()
        self.sampled_site_rgba = self.site_rgba.copy()

    def _arrays(self) -> tuple[np.ndarray, ...]:
        state = tuple(getattr(self.data, name) for name in _STATE)
        return (*state, *self.arm, *self.sleep, self.sample, self.site_rgba, self.sampled_site_rgba)

    def save(self) -> np.ndarray:
        """Copy everything that the episode's future depends on, as bytes."""
        arrays = (np.array([self.data.time]), *self._arrays())
        return np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays])

    def restore(self, saved: np.ndarray) -> None:
        """Goes on with an episode that was saved in a slot of the same model, here or in another process."""
        self.data.time = saved[:8].view(np.float64).item()
        start = 8
        for array in self._arrays():
            array[...] = saved[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            start += array.nbytes

    def start(self, task: Task, init_state: np.ndarray) -> None:
        """Do what stock's reset and ``set_init_state`` do."""
        self.task = task
        model, data, arrays = task.compiled.model, self.data, task.scene.arrays
        task.place_fixtures()
        mujoco.mj_resetData(model, data)
        data.time = init_state[0]
        data.qpos[:] = init_state[1 : 1 + model.nq]
        data.qvel[:] = init_state[1 + model.nq : 1 + model.nq + model.nv]
        data.ctrl[:] = arrays["ctrl"]
        data.qacc_warmstart[:] = arrays["qacc_warmstart"]
        for name, array in self.arm._asdict().items():
            array[...] = arrays[name]
        self.sleep.asleep[:] = self.sleep.still[:] = 0
        mujoco.mj_forward(model, data)
        self.site_rgba[:] = arrays["site_rgba"]
        self.update_burners()
        self.sampled_site_rgba[:] = self.site_rgba
        np.concatenate(self.sampled, out=self.sample)

    def rest(self) -> None:
        """Put to sleep what has come to rest, but nothing whose contacts the goal needs."""
        task = self.task
        if find_still(task.trees, self.sleep, self.views):
            needed = task.compiled.model.geom_bodyid[task.succeeded.in_contact(self.data)]
            needed = task.trees.body_tree[needed]
            self.sleep.still[needed[needed >= 0]] = 0
            put_to_sleep(task.trees, self.sleep, self.views)
            wake(task.trees, self.sleep, self.views)
            hide_sleeping(task.trees, self.sleep)

    def update_burners(self) -> None:
        """Show or hide the burners of stoves, by toggling their opacity as stock does."""
        for burner in self.task.scene.burners:
            on = any(self.data.qpos[address] >= burner.threshold for address in burner.qpos)
            if on != (self.site_rgba[burner.site, 3] > 0):
                self.site_rgba[burner.site, 3] = 1 - self.site_rgba[burner.site, 3]
