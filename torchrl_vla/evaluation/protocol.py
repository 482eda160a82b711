"""The evaluation protocol: fixed initial states, each run once to its end, judged by LIBERO's own goal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from torchrl_vla.collectors import EpisodePlan, GroupCollector, Progress
from torchrl_vla.collectors.plan import Episode
from torchrl_vla.envs.tasks import TaskSuite
from torchrl_vla.errors import UserError
from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport

__all__ = ["evaluate", "initial_states", "spread_episodes"]

#: Pictures are looked at and forgotten: an evaluation keeps what its report needs.
_PICTURES = (("observation", "image"), ("observation", "wrist_image"), ("observation", "state"))

#: Fewest episodes after which what is known is kept.
_PART = 100


def initial_states(suite: TaskSuite, task_ids: Iterable[int], wanted: list[int] | None) -> dict[int, list[int]]:
    """Return the initial states to use, by task.

    Args:
        suite: the suite.
        task_ids: its tasks to be run.
        wanted: the same states for every task; None: all of the task's, in order.

    Raises:
        ValueError: a task or a state does not exist.
    """
    states = {}
    for task_id in task_ids:
        count = len(suite.task(task_id).init_states)
        states[task_id] = list(range(count)) if wanted is None else wanted
        if max(states[task_id]) >= count:
            raise UserError(
                f"Initial state {max(states[task_id])} does not exist: task {task_id} of {suite.name} has "
                f"0..{count - 1}."
            )
    return states


def spread_episodes(
    task_ids: Iterable[int],
    init_state_ids: dict[int, list[int]],
    episodes: int,
    *,
    repeat: bool,
    task_by_task: bool = False,
) -> EpisodePlan:
    """Episodes spread evenly over tasks and, within a task, over its initial states in order.

    Args:
        task_ids: tasks, in the order in which they get an episode each.
        init_state_ids: initial states to use, by task.
        episodes: how many in all.
        repeat: where a task has fewer states than that asks for, it starts over; False leaves those episodes out, since
            greedy ones from the same state are nearly the same: they say nothing new, and would count as if they did.
        task_by_task: the same episodes, but all of a task before those of the next: where tasks have models of their
            own, a process then loads each once, however few it keeps.

    Examples:
        >>> plan = spread_episodes([0, 1], {0: [5, 6], 1: [7]}, 5, repeat=True)
        >>> [(e.task_id, e.init_state_id) for e in plan]
        [(0, 5), (1, 7), (0, 6), (1, 7), (0, 5)]
        >>> len(spread_episodes([0, 1], {0: [5, 6], 1: [7]}, 5, repeat=False))
        3
        >>> [e.task_id for e in spread_episodes([1, 0], {0: [5, 6], 1: [7, 8]}, 4, repeat=True, task_by_task=True)]
        [1, 1, 0, 0]
    """
    tasks = list(task_ids)
    starts = []
    for index in range(episodes):
        turn, place = divmod(index, len(tasks))
        states = init_state_ids[tasks[place]]
        if repeat or turn < len(states):
            starts.append((tasks[place], states[turn % len(states)]))
    if task_by_task:
        starts.sort(key=lambda start: tasks.index(start[0]))
    return EpisodePlan(starts)


def evaluate(
    env: EnvBase | Sequence[EnvBase],
    policy: Callable[[TensorDictBase], TensorDictBase],
    plan: Sequence[Episode],
    *,
    task_suite: str,
    instructions: dict[int, str],
    greedy: bool = True,
    progress: Callable[[Progress], None] | None = None,
    settings: dict[str, Any] | None = None,
    save: Callable[[EvaluationReport], None] | None = None,
) -> EvaluationReport:
    """Run every planned episode to its end, once.

    Args:
        env: as :class:`~torchrl_vla.collectors.GroupCollector` takes it.
        policy: the policy to judge.
        plan: the episodes; each initial state once if they are greedy.
        task_suite: name of the suite, for the report.
        instructions: instruction by task id, for the report.
        greedy: take the most likely action tokens; False samples at the policy's temperature.
        progress: called after every decision.
        settings: what else the report should say of how it was made.
        save: called with the report of the episodes so far whenever some hundred more are done, so that an interruption
            does not lose them.
    """
    collector = GroupCollector(
        env,
        policy,
        exploration_type=ExplorationType.DETERMINISTIC if greedy else ExplorationType.RANDOM,
        not_stored=(*GroupCollector.NOT_STORED, *_PICTURES),
    )
    report = EvaluationReport(task_suite, instructions, [], 0.0, {"greedy": greedy, **(settings or {})}, [])
    # Waiting for the last episodes of a part costs little where every environment runs ten of them.
    size = max(_PART, 10 * collector.num_slots)
    started = time.perf_counter()
    for start in range(0, len(plan), size):
        part = plan[start : start + size]
        collector.progress = None if progress is None else _continued(progress, report, len(plan))
        episodes, actions = _results(collector.collect(part, number=0), part)
        report = replace(
            report,
            episodes=[*report.episodes, *episodes],
            actions=[*report.actions, *actions],
            seconds=time.perf_counter() - started,
        )
        if save is not None and len(report.episodes) < len(plan):
            save(report)
    return report


def _continued(
    progress: Callable[[Progress], None], report: EvaluationReport, planned: int
) -> Callable[[Progress], None]:
    """Count on from the episodes of a report."""
    decisions = sum(episode.decisions for episode in report.episodes)
    successes = sum(episode.success for episode in report.episodes)

    def count(part: Progress) -> None:
        done = len(report.episodes) + part.episodes
        progress(Progress(decisions + part.decisions, done, successes + part.successes, planned))

    return count


def _results(batch: TensorDictBase, part: Sequence[Episode]) -> tuple[list[EpisodeResult], list[np.ndarray]]:
    """Return what became of each episode, and the actions [n, 7] that it ran."""
    trajectory = batch["collector", "traj_ids"] - batch["collector", "traj_ids"][0]
    decisions = trajectory.bincount(minlength=len(part)).tolist()
    control_steps = trajectory.bincount(
        weights=batch["next", "num_control_steps"].squeeze(-1).double(), minlength=len(part)
    ).tolist()
    success = batch["next", "success"].squeeze(-1)[batch["next", "done"].squeeze(-1)].tolist()
    episodes = [
        EpisodeResult(episode.task_id, episode.init_state_id, success[i], int(control_steps[i]), decisions[i])
        for i, episode in enumerate(part)
    ]
    chunks = batch["action"].reshape(len(batch), -1, batch["action"].shape[-1]).split(decisions)
    steps = batch["next", "num_control_steps"].split(decisions)
    return episodes, [_executed(chunk, count) for chunk, count in zip(chunks, steps, strict=True)]


def _executed(chunks: Tensor, steps: Tensor) -> np.ndarray:
    """Return the actions [n, 7] of chunks [T, K, 7] that were run: the first of each, as many as steps [T, 1]."""
    return chunks[torch.arange(chunks.shape[1]) < steps].numpy()
