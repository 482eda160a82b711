"""LIBERO with the bits of stock and without its waste: many episodes per process, restored instead of reset."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import mujoco
import numpy as np

from torchrl_vla.envs.simulation.control import control_step, hide_sleeping
from torchrl_vla.envs.simulation.controller_goals import goal_changes
from torchrl_vla.envs.simulation.model_cache import CompiledModel, load_scene, scene_key
from torchrl_vla.envs.simulation.sampled_states import sampled_init_states
from torchrl_vla.envs.simulation.scene_renderer import SceneRenderer
from torchrl_vla.envs.simulation.settled_states import keep_start, name_start, read_start
from torchrl_vla.envs.simulation.sleeping import unhide
from torchrl_vla.envs.simulation.slot import SAMPLED, Slot, Task
from torchrl_vla.envs.simulation.stock import SETTLE_ACTION
from torchrl_vla.envs.tasks import LiberoTask, get_suite
from torchrl_vla.errors import UserError

__all__ = ["LiberoSimulator"]

#: Settled initial states kept per simulator, some 60 kB each.
_MAX_SETTLED = 512


class LiberoSimulator:
    """Runs episodes of a task suite, with stock's results to the bit.

    Stock means ``OffScreenRenderEnv`` driven as OpenVLA's evaluation does: a new environment, ``seed``, ``reset``,
    ``set_init_state``, ten waits. With ``fidelity="exact"`` states, observations, success and pictures equal stock's to
    the bit. With ``fidelity="fast"`` the controller solves by Cholesky factors, the forward dynamics are evaluated once
    per substep, and objects at rest are left out until something comes near them (see
    :mod:`torchrl_vla.envs.simulation.sleeping`). Positions deviate by up to 6e-6 m from settling on, more where objects
    were pushed: over 80 control steps of 42 episodes 3e-8 in the median, 3e-4 in one of ten, 1e-2 at most. Pictures
    leave out anti-aliasing, mirrors and details of 2 mm: 2 to 4% of the agentview's pixels differ by over 20 of 255
    levels, the mean by 1 to 3 levels; of the wrist camera's, which comes near, up to 7%, the mean by up to 4. A tiny
    difference can decide whether a grasp holds, so report success rates with ``"exact"``.

    Slots may be stepped one after the other in one thread. What is shared, and made when it is first needed: the
    compiled model (0.3 GB, one for all tasks of ``libero_spatial``, one per task of ``libero_object``) and its render
    context (0.55 GB). A slot takes 5 MB.

    Args:
        task_suite: name of the suite.
        num_slots: number of episodes that are held at the same time, of any tasks.
        image_size: height and width of the pictures in pixels.
        cameras: names of the cameras that may be asked for.
        settle_steps: control steps without motion after the initial state is set.
        fidelity: ``"exact"`` or ``"fast"``.
        picture_fidelity: the same for the pictures alone; None: as ``fidelity``.
        seed: seed of the fixtures' poses.
        sampled_init_states: seed of as many initial states as there are official ones, drawn from the tasks' regions
            (see :mod:`torchrl_vla.envs.simulation.sampled_states`); None for the official ones.
        max_models: compiled models, with their render contexts, that are kept; None: those of all tasks seen. What a
            slot runs is always kept; to have another one again takes two seconds.

    Raises:
        ValueError: there is no such suite or fidelity, or a number is out of range.

    Examples:
        >>> simulator = LiberoSimulator("libero_spatial", num_slots=2, image_size=128)  # doctest: +SKIP
        >>> simulator.reset(0, task_id=0, init_state_id=0)  # doctest: +SKIP
        >>> simulator.step(0, np.zeros((8, 7)))  # doctest: +SKIP
        (8, False)
        >>> simulator.render(0, "agentview").shape  # doctest: +SKIP
        (128, 128, 3)
    """

    def __init__(
        self,
        task_suite: str,
        *,
        num_slots: int = 1,
        image_size: int = 256,
        cameras: tuple[str, ...] = ("agentview",),
        settle_steps: int = 10,
        fidelity: str = "exact",
        picture_fidelity: str | None = None,
        seed: int = 0,
        sampled_init_states: int | None = None,
        max_models: int | None = None,
    ) -> None:
        picture_fidelity = picture_fidelity or fidelity
        for name, value in (("fidelity", fidelity), ("picture_fidelity", picture_fidelity)):
            if value not in ("exact", "fast"):
                raise UserError(f"{name} must be 'exact' or 'fast', got {value!r}.")
        if num_slots < 1 or image_size < 1 or settle_steps < 0:
            raise UserError(
                "num_slots and image_size must be positive and settle_steps not negative, got "
                f"num_slots={num_slots}, image_size={image_size}, settle_steps={settle_steps}."
            )
        self._suite = get_suite(task_suite)
        self._image_size = image_size
        self._cameras = tuple(cameras)
        self._settle_steps = settle_steps
        self._exact = fidelity == "exact"
        self._exact_pictures = picture_fidelity == "exact"
        self._seed = seed
        self._sampled = sampled_init_states
        self._slots: list[Slot | None] = [None] * num_slots
        self._tasks: dict[int, Task] = {}
        self._renderers: dict[CompiledModel, SceneRenderer] = {}
        self._max_models = max_models
        #: The models in use and those kept, the longest unused first.
        self._models: OrderedDict[CompiledModel, None] = OrderedDict()
        self._settled: OrderedDict[str, np.ndarray] = OrderedDict()

    def reset(self, slot: int, task_id: int, init_state_id: int) -> None:
        """Start an episode from a settled initial state; draw nothing.

        The first reset to an initial state simulates the settling, later ones of any slot, process or run restore its
        end (see :mod:`torchrl_vla.envs.simulation.settled_states`).

        Args:
            slot: the slot, ``0 <= slot < num_slots``.
            task_id: index of the task in the suite.
            init_state_id: index of the task's initial state.

        Raises:
            ValueError: there is no such task or initial state.
        """
        self._checked(slot)
        task = self._task(task_id)
        if not 0 <= init_state_id < len(task.init_states):
            raise UserError(
                f"init_state_id={init_state_id} is not an initial state of task {task_id} of {self._suite.name}: it "
                f"must be in 0..{len(task.init_states) - 1}."
            )
        held = self._slots[slot]
        if held is None or held.task.compiled is not task.compiled:
            held = self._slots[slot] = Slot(task)
        held.task = task
        self._forget_models(task.compiled)
        init_state = task.init_states[init_state_id]
        name = name_start(task.key, init_state, self._settle_steps, exact=self._exact)
        settled = self._settled.get(name)
        if settled is None:
            settled = read_start(name)
        if settled is None:
            held.start(task, init_state)
            for _ in range(self._settle_steps):
                self.step(slot, np.array([SETTLE_ACTION]))
            settled = held.save()
            keep_start(name, settled)
        else:
            held.restore(settled)
            task.place_fixtures()
        # Poses follow from the state alone, whoever settled it.
        mujoco.mj_fwdPosition(task.compiled.model, held.data)
        self._settled[name] = settled
        self._settled.move_to_end(name)
        if len(self._settled) > _MAX_SETTLED:
            self._settled.popitem(last=False)

    def step(self, slot: int, actions: np.ndarray) -> tuple[int, bool]:
        """Run control steps until they end or the task succeeds.

        Args:
            slot: the slot.
            actions: ``[n, 7]`` actions; components outside [-1, 1] are clipped.

        Returns:
            tuple: control steps run, and whether the task has succeeded.

        Raises:
            ValueError: the actions are not numbers, or not of that shape.
        """
        actions = np.asarray(actions, dtype=np.float64)
        if actions.ndim != 2 or actions.shape[1] != 7:
            raise UserError(f"actions must have the shape [n, 7], got {list(actions.shape)} for slot {slot}.")
        if not np.isfinite(actions).all():
            raise UserError(f"actions of slot {slot} must be finite, got {actions[~np.isfinite(actions).all(1)][0]}.")
        held = self._held(slot)
        task = held.task
        task.place_fixtures()
        goals = goal_changes(actions)
        addresses = (task.compiled.model._address, held.data._address)
        state = (held.views, held.sampled, task.robot, held.arm)
        hide_sleeping(task.trees, held.sleep)
        try:
            for index in range(len(actions)):
                held.sampled_site_rgba[:] = held.site_rgba
                control_step(*addresses, *state, goals, index, held.sample, task.trees, held.sleep, self._exact)
                held.update_burners()
                if task.succeeded(held.data):
                    return index + 1, True
                if not self._exact:
                    held.rest()
        finally:
            # Other simulators of this process may share the model.
            unhide(task.trees)
        return len(actions), False

    def low_dim(self, slot: int) -> dict[str, np.ndarray]:
        """Return the end effector's pose and the fingers' positions, float64.

        They are ``robot0_eef_pos [3]``, ``robot0_eef_quat [4]`` (x, y, z, w) and ``robot0_gripper_qpos [2]``.
        """
        held = self._held(slot)
        scene, sample = held.task.scene, self._sample(held)
        return {
            "robot0_eef_pos": sample["site_xpos"][scene.arrays["site"][0]].copy(),
            "robot0_eef_quat": sample["xquat"][scene.eef_body][[1, 2, 3, 0]],
            "robot0_gripper_qpos": sample["qpos"][list(scene.gripper_qpos)],
        }

    def object_poses(self, slot: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return position ``[3]`` and quaternion ``[4]`` (x, y, z, w) of movable objects, as stock observes them."""
        held = self._held(slot)
        sample = self._sample(held)
        return {
            name: (sample["xpos"][body].copy(), sample["xquat"][body][[1, 2, 3, 0]])
            for name, body in held.task.scene.object_bodies.items()
        }

    def model(self, slot: int) -> mujoco.MjModel:
        """Return the compiled model, with fixtures where the slot's task has them; shared, so not to be changed."""
        task = self._held(slot).task
        task.place_fixtures()
        return task.compiled.model

    def data(self, slot: int) -> mujoco.MjData:
        """Return a slot's simulation state, for those who may know more than what is observed; not to be changed."""
        return self._held(slot).data

    def render(self, slot: int, camera: str) -> np.ndarray:
        """Return a camera's picture of the last control step, ``uint8 [H, W, 3]``, upside down as LIBERO gives it.

        Args:
            slot: the slot.
            camera: name of a camera.

        Raises:
            ValueError: there is no such camera.
        """
        held = self._held(slot)
        compiled = held.task.compiled
        index = _camera(compiled.model, camera)
        if compiled not in self._renderers:
            self._renderers[compiled] = SceneRenderer(compiled, self._image_size, exact=self._exact_pictures)
        return self._renderers[compiled].render(held.sample, held.sampled_site_rgba, index)

    def close(self) -> None:
        """Frees all data and OpenGL contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._models.clear()
        self._settled.clear()
        self._tasks.clear()
        self._slots = [None] * len(self._slots)

    def _task(self, task_id: int) -> Task:
        if task_id not in self._tasks:
            definition = self._suite.task(task_id)
            key = scene_key(definition.bddl_file, self._seed)
            task = Task(key, *load_scene(definition.bddl_file, self._seed), self._init_states(definition))
            for camera in self._cameras:
                _camera(task.compiled.model, camera)
            self._tasks[task_id] = task
        return self._tasks[task_id]

    def _forget_models(self, current: CompiledModel) -> None:
        """Frees models that no slot runs and that are too many, those first that have not been used for longest."""
        self._models[current] = None
        self._models.move_to_end(current)
        if self._max_models is None or len(self._models) <= self._max_models:
            return
        running = {held.task.compiled for held in self._slots if held is not None}
        idle = [compiled for compiled in self._models if compiled not in running]
        for compiled in idle[: len(self._models) - self._max_models]:
            del self._models[compiled]
            self._tasks = {task_id: task for task_id, task in self._tasks.items() if task.compiled is not compiled}
            if compiled in self._renderers:
                self._renderers.pop(compiled).close()

    def _init_states(self, task: LiberoTask) -> np.ndarray:
        if self._sampled is None:
            return task.init_states
        return sampled_init_states(task.bddl_file, len(task.init_states), seed=self._sampled, fixture_seed=self._seed)

    def _held(self, slot: int) -> Slot:
        held = self._slots[self._checked(slot)]
        if held is None:
            raise UserError(f"Slot {slot} runs no episode yet: call reset(slot, task_id, init_state_id) first.")
        return held

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < len(self._slots):
            raise UserError(f"slot={slot} does not exist: it must be in 0..{len(self._slots) - 1}.")
        return slot

    def _sample(self, held: Slot) -> dict[str, np.ndarray]:
        views: dict[str, Any] = {}
        start = 0
        for name, array in zip(SAMPLED, held.sampled, strict=True):
            views[name] = held.sample[start : start + array.size].reshape(getattr(held.data, name).shape)
            start += array.size
        return views


def _camera(model: mujoco.MjModel, name: str) -> int:
    index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
    if index < 0:
        names = ", ".join(model.camera(i).name for i in range(model.ncam))
        raise UserError(f"There is no camera {name!r} in this scene. Its cameras are: {names}.")
    return index
