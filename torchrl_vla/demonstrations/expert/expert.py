"""A scripted demonstrator that solves LIBERO's tasks from the simulator's state."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Sequence

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.arm import GRIPPER_OPEN, Arm
from torchrl_vla.demonstrations.expert.geometry import CollisionPoints
from torchrl_vla.demonstrations.expert.insertion import Insertion
from torchrl_vla.demonstrations.expert.joints import MoveJoint
from torchrl_vla.demonstrations.expert.skills import choose_skills
from torchrl_vla.demonstrations.expert.task_goals import Goal
from torchrl_vla.errors import UserError

__all__ = ["ScriptedExpert"]


class ScriptedExpert:
    """Looks at object poses that a policy never sees, and returns actions that a policy could take.

    Objects are grasped, carried and put down, drawers and doors opened and closed, knobs turned, in an order in which
    one does not undo the other; what slipped or was missed is tried again. It works from a model and its data alone,
    so that it drives any simulator of LIBERO, and it has no randomness.

    Args:
        model: the task's compiled model; shared models whose fixtures are moved per episode are fine.
        goals: the task's goal, as ``read_goals`` gives it.

    Raises:
        ValueError: there is no goal.
        UnreachableGoalError: a goal is of a kind that no skill reaches, or names what the model does not have.

    Examples:
        >>> expert = ScriptedExpert(model, read_goals(task.bddl_file))  # doctest: +SKIP
        >>> expert.reset(data)  # doctest: +SKIP
        >>> simulator.step(0, expert.action()[None])  # doctest: +SKIP
    """

    def __init__(self, model: mujoco.MjModel, goals: Sequence[Goal]) -> None:
        if not goals:
            raise UserError("goals must not be empty: pass what read_goals(task.bddl_file) returns.")
        self._arm = Arm(model)
        self._model = model
        self._steps = choose_skills(model, self._arm, CollisionPoints(model), goals)
        self._script: Generator[np.ndarray, None, None] | None = None

    def reset(self, data: mujoco.MjData) -> None:
        """Start an episode.

        Args:
            data: the simulation, settled; every later ``action`` reads it. The fixtures' poses in the model are this
                episode's.

        Raises:
            UnreachableGoalError: the hand fits at no handle, or at no part of an object that goes into a compartment.
        """
        # A state that was just simulated and the same one restored differ in how fresh poses and velocities are.
        for refresh in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_comVel):
            refresh(self._model, data)
        for skill in itertools.chain(*self._steps):
            if isinstance(skill, MoveJoint | Insertion):
                skill.check(data)
        self._script = self._run(data)

    def action(self) -> np.ndarray:
        """Return the next action for the state that ``data`` is in, ``float64 [7]`` within [-1, 1].

        Raises:
            RuntimeError: ``reset`` was not called.
        """
        if self._script is None:
            raise RuntimeError("ScriptedExpert.action() needs an episode: call reset(data) first.")
        return next(self._script)

    def _run(self, data: mujoco.MjData) -> Generator[np.ndarray, None, None]:
        yield from self._pass(data, range(len(self._steps)))
        while True:
            # What slid away or was pushed open again; everything, if nothing seems to be missing.
            left = [index for index, step in enumerate(self._steps) if not step[-1].done(data)]
            acted = False
            for action in self._pass(data, left or range(len(self._steps))):
                acted = True
                yield action
            if not acted:
                yield self._arm.towards(data, *self._arm.pose(data), GRIPPER_OPEN)

    def _pass(self, data: mujoco.MjData, indices: Iterable[int]) -> Generator[np.ndarray, None, None]:
        for index in indices:
            for skill in self._steps[index]:
                yield from skill.script(data)
