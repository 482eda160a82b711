"""A scripted demonstrator that solves LIBERO's pick-and-place tasks from the simulator's state."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.arm import Arm
from torchrl_vla.demonstrations.expert.geometry import CollisionPoints
from torchrl_vla.demonstrations.expert.insertion import Insertion
from torchrl_vla.demonstrations.expert.joints import MoveJoint
from torchrl_vla.demonstrations.expert.skills import choose_skills
from torchrl_vla.demonstrations.expert.task_goals import Goal

__all__ = ["ScriptedExpert"]


class ScriptedExpert:
    """Looks at object poses that a policy never sees, and returns actions that a policy could take.

    Each object of the goal is grasped, carried and put down in turn; what slipped or was missed is tried again. It
    works from a model and its data alone, so that it drives any simulator of LIBERO, and it has no randomness.

    Args:
        model: the task's compiled model; shared models whose fixtures are moved per episode are fine.
        goals: the task's goal, as ``read_goals`` gives it.

    Raises:
        ValueError: there is no goal.
        UnreachableGoalError: a goal is not about where an object lies, or names what the model does not have.

    Examples:
        >>> expert = ScriptedExpert(model, read_goals(task.bddl_file))  # doctest: +SKIP
        >>> expert.reset(data)  # doctest: +SKIP
        >>> simulator.step(0, expert.action()[None])  # doctest: +SKIP
    """

    def __init__(self, model: mujoco.MjModel, goals: Sequence[Goal]) -> None:
        if not goals:
            raise ValueError("goals must not be empty: pass what read_goals(task.bddl_file) returns.")
        arm, surfaces = Arm(model), CollisionPoints(model)
        self._model = model
        self._parts = choose_skills(model, arm, surfaces, goals)
        self._script: Generator[np.ndarray, None, None] | None = None

    def reset(self, data: mujoco.MjData) -> None:
        """Starts an episode.

        Args:
            data: the simulation, settled; every later ``action`` reads it. The fixtures' poses in the model are this
                episode's.

        Raises:
            UnreachableGoalError: something belongs where the hand cannot put it from above.
        """
        # A state that was just simulated and the same one restored differ in how fresh poses and velocities are.
        for refresh in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_comVel):
            refresh(self._model, data)
        for part in self._parts:
            if isinstance(part, MoveJoint | Insertion):
                part.check(data)
        self._script = self._run(data)

    def action(self) -> np.ndarray:
        """Returns the next action for the state that ``data`` is in, ``float64 [7]`` within [-1, 1].

        Raises:
            RuntimeError: ``reset`` was not called.
        """
        if self._script is None:
            raise RuntimeError("ScriptedExpert.action() needs an episode: call reset(data) first.")
        return next(self._script)

    def _run(self, data: mujoco.MjData) -> Generator[np.ndarray, None, None]:
        while True:
            for part in self._parts:
                yield from part.script(data)
