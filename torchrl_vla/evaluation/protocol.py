"""The evaluation protocol: fixed initial states, each run once to its end, judged by LIBERO's own goal."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    done: EvaluationReport | None = None,
    stop: Callable[[], bool] | None = None,
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
        done: a report, with its actions, of some of these episodes, which are not run again.
        stop: asked after every decision; True ends the evaluation, and the report has the episodes done until then.

    Raises:
        ValueError: `done` has an episode that is not planned.
    """
    collector = GroupCollector(
        env,
        policy,
        exploration_type=ExplorationType.DETERMINISTIC if greedy else ExplorationType.RANDOM,
        not_stored=(*GroupCollector.NOT_STORED, *_PICTURES),
    )
    report = EvaluationReport(task_suite, instructions, [], 0.0, {"greedy": greedy, **(settings or {})}, [])
    found: dict[int, tuple[EpisodeResult, np.ndarray]] = {}
    if done is not None:
        found = dict(zip(_places(plan, done), zip(done.episodes, done.actions, strict=True), strict=True))
        report = _report_of(report, plan, found, done.seconds)
    left = [place for place in range(len(plan)) if place not in found]
    # Waiting for the last episodes of a part costs little where every environment runs ten of them.
    size = max(_PART, 10 * collector.num_slots)
    started = time.perf_counter() - report.seconds
    for start in range(0, len(left), size):
        places = left[start : start + size]
        part = [plan[place] for place in places]
        collector.progress = None if progress is None else _continued(progress, report, len(plan))
        results = _results(collector.collect(part, number=0, stop=stop), part, first=start)
        found |= {places[index]: result for index, result in results.items()}
        report = _report_of(report, plan, found, time.perf_counter() - started)
        if len(results) < len(part):
            break
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


def _places(plan: Sequence[Episode], report: EvaluationReport) -> list[int]:
    """Return where a report's episodes are in the plan: the first from a state is the plan's first from it, and so on.

    Raises:
        ValueError: one of them is not planned.
    """
    planned = defaultdict[tuple[int, int], list[int]](list)
    for place in reversed(range(len(plan))):
        planned[plan[place].task_id, plan[place].init_state_id].append(place)
    places = []
    for episode in report.episodes:
        left = planned[episode.task_id, episode.init_state_id]
        if not left:
            raise UserError(
                f"The report has an episode of task {episode.task_id} from initial state {episode.init_state_id} that "
                "is not planned: go on with the tasks, states and number of episodes that it was begun with."
            )
        places.append(left.pop())
    return places


def _report_of(
    report: EvaluationReport,
    plan: Sequence[Episode],
    found: Mapping[int, tuple[EpisodeResult, np.ndarray]],
    seconds: float,
) -> EvaluationReport:
    """Return a report of the episodes found so far, in the plan's order.

    Of several from one state, those after one that is missing are left out: their number would not be known.
    """
    missing: set[tuple[int, int]] = set()
    kept = []
    for place, episode in enumerate(plan):
        start = episode.task_id, episode.init_state_id
        if place not in found:
            missing.add(start)
        elif start not in missing:
            kept.append(found[place])
    return replace(
        report, episodes=[episode for episode, _ in kept], actions=[actions for _, actions in kept], seconds=seconds
    )


def _results(
    batch: TensorDictBase, part: Sequence[Episode], *, first: int
) -> dict[int, tuple[EpisodeResult, np.ndarray]]:
    """Return what became of each episode that was run to its end, and the actions [n, 7] that it ran, by its index.

    Args:
        batch: of the part.
        part: the episodes.
        first: how many the collector was given before.
    """
    if not len(batch):
        return {}
    trajectory = batch["collector", "traj_ids"] - first
    decisions = trajectory.bincount(minlength=len(part)).tolist()
    control_steps = trajectory.bincount(
        weights=batch["next", "num_control_steps"].squeeze(-1).double(), minlength=len(part)
    ).tolist()
    successes = iter(batch["next", "success"].squeeze(-1)[batch["next", "done"].squeeze(-1)].tolist())
    chunks = batch["action"].reshape(len(batch), -1, batch["action"].shape[-1]).split(decisions)
    steps = batch["next", "num_control_steps"].split(decisions)
    return {
        i: (
            EpisodeResult(episode.task_id, episode.init_state_id, next(successes), int(control_steps[i]), decisions[i]),
            _executed(chunks[i], steps[i]),
        )
        for i, episode in enumerate(part)
        if decisions[i]
    }


def _executed(chunks: Tensor, steps: Tensor) -> np.ndarray:
    """Return the actions [n, 7] of chunks [T, K, 7] that were run: the first of each, as many as steps [T, 1]."""
    return chunks[torch.arange(chunks.shape[1]) < steps].numpy()
