"""How often the scripted expert solves LIBERO's tasks, and in how many control steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import mujoco
import numpy as np

from torchrl_vla.demonstrations.expert.expert import ScriptedExpert
from torchrl_vla.demonstrations.expert.perturbation import Perturbation
from torchrl_vla.demonstrations.expert.task_goals import read_goals
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.envs.tasks import get_suite

__all__ = ["ExpertEpisode", "Steppable", "evaluate_expert", "run_episode", "success_table"]


class Steppable(Protocol):
    """What an episode needs of a simulator, such as ``LiberoSimulator``."""

    def step(self, slot: int, actions: np.ndarray) -> tuple[int, bool]:
        """Run ``actions [n, 7]`` in a slot; return control steps run and whether the task has succeeded."""

    def model(self, slot: int) -> mujoco.MjModel:
        """Return the slot's compiled model, fixtures in place."""

    def data(self, slot: int) -> mujoco.MjData:
        """Return the slot's state."""


class ExpertEpisode(NamedTuple):
    """One episode: what was tried, whether the task was solved, and the control steps that ran."""

    task_id: int
    init_state_id: int
    success: bool
    num_steps: int


def run_episode(
    simulator: Steppable,
    expert: ScriptedExpert,
    *,
    max_steps: int,
    slot: int = 0,
    perturb: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[bool, int]:
    """Lets the expert act until the task is solved or time is up.

    Args:
        simulator: its slot was just reset.
        expert: made for the slot's model; it is reset here.
        max_steps: control steps after which it has failed.
        slot: the slot.
        perturb: turns the expert's action ``[7]`` into the one to execute.

    Returns:
        tuple: success and control steps run.
    """
    expert.reset(simulator.data(slot))
    for step in range(1, max_steps + 1):
        action = expert.action()
        _, success = simulator.step(slot, (action if perturb is None else perturb(action))[None])
        if success:
            return True, step
    return False, max_steps


def evaluate_expert(
    task_suite: str,
    task_ids: Iterable[int] | None = None,
    init_state_ids: Iterable[int] | None = None,
    *,
    perturbed: bool = False,
    fidelity: str = "exact",
    seed: int = 0,
) -> list[ExpertEpisode]:
    """Run the expert from official initial states, up to the suite's horizon.

    Args:
        task_suite: name of the suite.
        task_ids: tasks; all of them by default.
        init_state_ids: initial states of each task; all of them by default.
        perturbed: whether to push it off its way.
        fidelity: the simulator's.
        seed: of fixtures' poses and perturbations.

    Returns:
        list: the episodes, one for each task and initial state.

    Examples:
        >>> print(success_table(evaluate_expert("libero_spatial", [0], range(5))))  # doctest: +SKIP
    """
    suite = get_suite(task_suite)
    simulator = LiberoSimulator(task_suite, fidelity=fidelity, seed=seed)
    episodes = []
    try:
        for task_id in range(len(suite.tasks)) if task_ids is None else task_ids:
            task = suite.task(task_id)
            expert = None
            for state_id in range(len(task.init_states)) if init_state_ids is None else init_state_ids:
                simulator.reset(0, task_id, state_id)
                expert = expert or ScriptedExpert(simulator.model(0), read_goals(task.bddl_file))
                perturb = Perturbation([seed, task_id, state_id]) if perturbed else None
                outcome = run_episode(simulator, expert, max_steps=suite.horizon, perturb=perturb)
                episodes.append(ExpertEpisode(task_id, state_id, *outcome))
    finally:
        simulator.close()
    return episodes


def success_table(episodes: Iterable[ExpertEpisode]) -> str:
    """Format results as a Markdown table, one row per task.

    Args:
        episodes: what ``evaluate_expert`` returned.
    """
    by_task: defaultdict[int, list[ExpertEpisode]] = defaultdict(list)
    for episode in episodes:
        by_task[episode.task_id].append(episode)
    lines = ["| task | solved | mean steps | most steps | failed from |", "|---|---|---|---|---|"]
    for task_id, runs in by_task.items():
        solved = [run.num_steps for run in runs if run.success]
        mean, most = (f"{np.mean(solved):.1f}", str(max(solved))) if solved else ("-", "-")
        failed = ", ".join(str(run.init_state_id) for run in runs if not run.success)
        lines.append(f"| {task_id} | {len(solved)}/{len(runs)} | {mean} | {most} | {failed} |")
    return "\n".join(lines)
