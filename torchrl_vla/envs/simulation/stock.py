"""LIBERO's own ``OffScreenRenderEnv`` behind the simulator interface: slow, and the reference for any faster one."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchrl_vla.envs.installation import import_libero_envs
from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.envs.tasks import get_suite
from torchrl_vla.errors import UserError

__all__ = ["SETTLE_ACTION", "StockSimulator"]

#: What the evaluation protocol does while objects come to rest: no motion, gripper open.
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


class StockSimulator:
    """LIBERO as its authors ship it, driven as OpenVLA's evaluation drives it.

    Each slot holds one environment (some 0.8 GB) of the task that it runs; moving a slot to another task builds it
    anew. An episode depends on its task, initial state and the seed alone: the seed is set before every reset, since
    LIBERO draws the poses of fixtures there from NumPy's global generator (which is left as it was found).

    Args:
        task_suite: name of the suite.
        num_slots: number of environments.
        image_size: height and width of the pictures in pixels.
        cameras: names of the cameras, all rendered at every control step.
        settle_steps: control steps without motion after the initial state is set.
        fidelity: ``"exact"``; there is no other.
        seed: seed of the fixtures' poses.

    Examples:
        >>> simulator = StockSimulator("libero_spatial", image_size=64)  # doctest: +SKIP
        >>> simulator.reset(0, task_id=0, init_state_id=0)  # doctest: +SKIP
        >>> simulator.step(0, np.zeros((8, 7)))  # doctest: +SKIP
        (8, False)
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
        seed: int = 0,
    ) -> None:
        if fidelity != "exact":
            raise UserError(f"StockSimulator has fidelity='exact' only, got {fidelity!r}.")
        configure_rendering()
        self._suite = get_suite(task_suite)
        self._image_size = image_size
        self._cameras = tuple(cameras)
        self._settle_steps = settle_steps
        self._seed = seed
        self._envs: list[Any] = [None] * num_slots
        self._task_ids: list[int | None] = [None] * num_slots
        self._initializers: list[list[Any]] = [[] for _ in range(num_slots)]
        self._observations: list[dict[str, np.ndarray]] = [{} for _ in range(num_slots)]

    def reset(self, slot: int, task_id: int, init_state_id: int) -> None:
        """Start an episode and let the objects settle.

        Args:
            slot: the slot, ``0 <= slot < num_slots``.
            task_id: index of the task in the suite.
            init_state_id: index of the task's initial state.
        """
        task = self._suite.task(task_id)
        env = self._env(slot, task_id)
        generator_state = np.random.get_state()
        # Every reset appends to this list, and each entry draws random numbers at the next one.
        env.env.object_property_initializers = list(self._initializers[slot])
        env.seed(self._seed)
        env.reset()
        np.random.set_state(generator_state)
        observation = env.set_init_state(task.init_states[init_state_id])
        for _ in range(self._settle_steps):
            observation, *_ = env.step(list(SETTLE_ACTION))
        self._observations[slot] = observation

    def step(self, slot: int, actions: np.ndarray) -> tuple[int, bool]:
        """Run control steps until they end or the task succeeds.

        Args:
            slot: the slot.
            actions: ``[n, 7]`` actions.

        Returns:
            tuple: control steps run, and whether the task has succeeded.
        """
        # Stock draws with whatever OpenGL context is current, which may be another slot's.
        self._envs[slot].sim._render_context_offscreen.gl_ctx.make_current()
        for count, action in enumerate(actions, start=1):
            self._observations[slot], _, success, _ = self._envs[slot].step(action)
            if success:
                return count, True
        return len(actions), False

    def low_dim(self, slot: int) -> dict[str, np.ndarray]:
        """Return ``robot0_eef_pos [3]``, ``robot0_eef_quat [4]`` (x, y, z, w), ``robot0_gripper_qpos [2]``."""
        names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        return {name: self._observations[slot][name] for name in names}

    def render(self, slot: int, camera: str) -> np.ndarray:
        """Return a camera's picture of the last control step, ``uint8 [H, W, 3]``, upside down as LIBERO gives it."""
        return self._observations[slot][f"{camera}_image"]

    def close(self) -> None:
        """Frees all environments and their OpenGL contexts."""
        for slot in range(len(self._envs)):
            self._discard(slot)

    def _env(self, slot: int, task_id: int) -> Any:
        if self._task_ids[slot] != task_id:
            self._discard(slot)
            generator_state = np.random.get_state()
            self._envs[slot] = import_libero_envs().OffScreenRenderEnv(
                bddl_file_name=str(self._suite.task(task_id).bddl_file),
                camera_names=list(self._cameras),
                camera_heights=self._image_size,
                camera_widths=self._image_size,
                ignore_done=True,
            )
            np.random.set_state(generator_state)
            self._initializers[slot] = list(self._envs[slot].env.object_property_initializers)
            self._task_ids[slot] = task_id
        return self._envs[slot]

    def _discard(self, slot: int) -> None:
        if self._envs[slot] is not None:
            self._envs[slot].close()
        self._envs[slot], self._task_ids[slot], self._observations[slot] = None, None, {}
