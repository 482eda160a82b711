"""LIBERO's own environment, driven as the evaluation protocol drives it, to compare a simulator with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest

from torchrl_vla.envs.installation import import_libero_envs
from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.envs.simulation import simulator as simulator_module
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.envs.tasks import LiberoTask, TaskSuite, get_suite

CAMERAS = ("agentview", "robot0_eye_in_hand")
LOW_DIM = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


class Stock:
    """``OffScreenRenderEnv`` of one task; every ``start`` gives what a new environment would.

    Args:
        task: the task.
        seed: seed of the fixtures' poses.
        image_size: height and width in pixels.
    """

    def __init__(self, task: LiberoTask, *, seed: int = 0, image_size: int = 64) -> None:
        configure_rendering()
        self._seed = seed
        self.env = import_libero_envs().OffScreenRenderEnv(
            bddl_file_name=str(task.bddl_file),
            camera_names=list(CAMERAS),
            camera_heights=image_size,
            camera_widths=image_size,
            ignore_done=True,
        )
        # Every reset appends to this list, and later resets draw more random numbers than the first.
        self._initializers = list(self.env.env.object_property_initializers)
        self.draws = True

    def start(self, init_state: np.ndarray, settle_steps: int = 10) -> None:
        self.env.env.object_property_initializers = list(self._initializers)
        self._make_current()
        self.env.seed(self._seed)
        self.env.reset()
        self._draw = self.env.sim.render
        self.env.sim.render = self._render
        self.observation = self.env.set_init_state(init_state)
        self.success = False
        for _ in range(settle_steps):
            self.step([0, 0, 0, 0, 0, 0, -1])

    def step(self, action: Sequence[float]) -> None:
        self.observation, self.reward, self.success, _ = self.env.step(action)

    def _render(self, **options: Any) -> np.ndarray:
        if not self.draws:
            return np.zeros((1, 1, 3), np.uint8)
        self._make_current()
        return self._draw(**options)

    def _make_current(self) -> None:
        """Stock draws with, and frees the objects of, whatever context is current: here another simulator's."""
        self.env.sim._render_context_offscreen.gl_ctx.make_current()

    def close(self) -> None:
        self._make_current()
        self.env.close()


def assert_same(stage: str, ours: LiberoSimulator, slot: int, stock: Stock, *, images: bool) -> None:
    """Compares everything that can be observed, and says what differs first and by how much."""
    data, theirs = ours.data(slot), stock.env.sim.data
    pairs = {name: (getattr(data, name), getattr(theirs, name)) for name in ("qpos", "qvel", "qacc_warmstart", "ctrl")}
    low_dim = ours.low_dim(slot)
    pairs |= {name: (low_dim[name], stock.observation[name]) for name in LOW_DIM}
    poses = ours.object_poses(slot)
    pairs |= {f"{name}_pos": (pose[0], stock.observation[f"{name}_pos"]) for name, pose in poses.items()}
    pairs |= {f"{name}_quat": (pose[1], stock.observation[f"{name}_quat"]) for name, pose in poses.items()}
    if images:
        pairs |= {camera: (ours.render(slot, camera), stock.observation[f"{camera}_image"]) for camera in CAMERAS}
    assert data.time == theirs.time, f"{stage}: time {data.time} instead of {theirs.time}"
    for name, (value, expected) in pairs.items():
        difference = np.abs(np.asarray(value, np.float64) - expected)
        assert np.array_equal(value, expected), (
            f"{stage}: {name} differs from stock's in {np.count_nonzero(difference)} of {difference.size} elements, by "
            f"{difference.max()} at most"
        )


def changed_start(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    suite: str,
    task_id: int,
    prepare: Callable[[mujoco.MjModel, np.ndarray], None],
) -> LiberoTask:
    """A task whose only initial state was changed; new simulators of the suite find it as their task 0."""
    task = get_suite(suite).task(task_id)
    simulator = LiberoSimulator(suite, settle_steps=0)
    simulator.reset(0, task_id, 0)
    state = task.init_states[0].copy()
    prepare(simulator.model(0), state)
    simulator.close()
    np.savez(folder / "states.npz", states=state[None])
    changed = LiberoTask(suite, 0, task.instruction, task.bddl_file, folder / "states.npz")
    monkeypatch.setattr(simulator_module, "get_suite", lambda name: TaskSuite(name, (changed,), 220))
    return changed


def random_actions(count: int, seed: int) -> np.ndarray:
    """Uniform in [-1.2, 1.2], so that some are clipped; every third does not turn the hand."""
    actions = np.random.default_rng(seed).uniform(-1.2, 1.2, (count, 7))
    actions[::3, 3:6] = 0.0
    return actions


def smooth_actions(count: int, seed: int) -> np.ndarray:
    """A sweep down to the table and over it, with the gripper closing and opening."""
    generator = np.random.default_rng(seed)
    phase = np.linspace(0, 2 * np.pi, count)[:, None]
    actions = np.zeros((count, 7))
    actions[:, :6] = 0.6 * np.sin(phase * generator.uniform(0.5, 3, 6) + generator.uniform(0, 6, 6))
    actions[:, 2] -= 0.35
    actions[:, 3:6] *= 0.3
    actions[:, 6] = np.where(np.sin(phase[:, 0] * 3) > 0, 1.0, -1.0)
    return actions
