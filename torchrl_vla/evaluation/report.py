"""What an evaluation found: per task and in all, with intervals; as JSON, CSV and a few lines of text."""

from __future__ import annotations

import csv
import dataclasses
import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_vla.errors import UserError
from torchrl_vla.files import whole_file, write_json

__all__ = ["EpisodeResult", "EvaluationReport", "SuccessRate", "TaskResult", "report_file"]

_JSON_NAME = "report.json"
_ACTIONS_NAME = "actions.npz"


@dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    Args:
        task_id: task in its suite.
        init_state_id: initial state of the task.
        success: whether the goal was reached within the horizon.
        control_steps: control steps run (20 Hz).
        decisions: times that the policy was asked.
    """

    task_id: int
    init_state_id: int
    success: bool
    control_steps: int
    decisions: int


@dataclass(frozen=True)
class SuccessRate:
    """A success rate with its 95% Wilson interval (E. B. Wilson, 1927).

    Args:
        successes: episodes that reached the goal.
        episodes: episodes run, at least 1.

    Examples:
        >>> rate = SuccessRate(8, 10)
        >>> print(rate)
        80.0% [49.0, 94.3] (8/10)
    """

    successes: int
    episodes: int

    @property
    def rate(self) -> float:
        """Share of successes."""
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95% interval."""
        from scipy.stats import binomtest  # takes most of a second

        low, high = binomtest(self.successes, self.episodes).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} [{100 * low:.1f}, {100 * high:.1f}] ({self.successes}/{self.episodes})"


@dataclass(frozen=True)
class TaskResult:
    """The episodes of one task.

    Args:
        success: how many reached the goal.
        mean_length: control steps per episode.
        decisions: decisions per episode.
    """

    success: SuccessRate
    mean_length: float
    decisions: float

    @classmethod
    def of(cls, episodes: Sequence[EpisodeResult]) -> TaskResult:
        """Sum up episodes, at least one."""
        count = len(episodes)
        return cls(
            SuccessRate(sum(episode.success for episode in episodes), count),
            sum(episode.control_steps for episode in episodes) / count,
            sum(episode.decisions for episode in episodes) / count,
        )


@dataclass
class EvaluationReport:
    """The episodes of one evaluation and how they were run.

    Args:
        task_suite: name of the suite.
        instructions: instruction by task id.
        episodes: every episode that was run.
        seconds: wall-clock time of the whole evaluation.
        settings: what the reader needs to repeat it: checkpoint, initial states, temperature, horizon, versions.
        actions: float32 ``[control steps, 7]``, what was done in each episode; not written, but enough to film it.
    """

    task_suite: str
    instructions: dict[int, str]
    episodes: Sequence[EpisodeResult]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    actions: Sequence[np.ndarray] = field(default=(), repr=False, compare=False)

    @property
    def total(self) -> SuccessRate:
        """Success over all tasks."""
        return TaskResult.of(self.episodes).success

    @property
    def tasks(self) -> dict[int, TaskResult]:
        """Results by task id, in order."""
        by_task: dict[int, list[EpisodeResult]] = {}
        for episode in self.episodes:
            by_task.setdefault(episode.task_id, []).append(episode)
        return {task: TaskResult.of(rows) for task, rows in sorted(by_task.items())}

    @property
    def caveat(self) -> str | None:
        """What the intervals do not say; None where every initial state was run once, so that nothing is missing."""
        runs = Counter((episode.task_id, episode.init_state_id) for episode in self.episodes)
        if len(runs) == len(self.episodes):
            return None
        counted = f"{len(runs)} initial states were run up to {max(runs.values())} times each"
        if self.settings.get("greedy"):
            return f"{counted}, greedily: such episodes are nearly the same, so the intervals are too narrow."
        return f"{counted}, with actions sampled anew: the intervals are for these states, not for others."

    def figures(self) -> dict[str, float]:
        """Return the figures of the whole evaluation, by name."""
        total = TaskResult.of(self.episodes)
        return {
            "success_rate": total.success.rate,
            "mean_length": total.mean_length,
            "decisions_per_episode": total.decisions,
            "seconds_per_episode": self.seconds / len(self.episodes),
        }

    def __str__(self) -> str:
        lines = [f"{self.task_suite}: {self.total}, {self.figures()['mean_length']:.0f} control steps per episode"]
        width = max(len(text) for text in self.instructions.values())
        lines += [
            f"  task {task:>2}  {self.instructions[task]:<{width}}  {result.success}"
            for task, result in self.tasks.items()
        ]
        if self.caveat is not None:
            lines.append(f"  {self.caveat}")
        return "\n".join(lines)

    def save(self, folder: Path, **more: Mapping[str, Any]) -> None:
        """Write `report.json` (everything) and `episodes.csv` (a row per episode).

        Args:
            folder: made if it does not exist.
            more: further entries of `report.json`, such as a comparison.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tasks = {
            task: {
                "instruction": self.instructions[task],
                "success": str(result.success),
                "rate": result.success.rate,
                "interval": result.success.interval,
                "mean_length": result.mean_length,
                "decisions_per_episode": result.decisions,
            }
            for task, result in self.tasks.items()
        }
        content = {
            "task_suite": self.task_suite,
            "success": str(self.total),
            "interval": self.total.interval,
            "caveat": self.caveat,
            **self.figures(),
            "seconds": self.seconds,
            "tasks": tasks,
            **more,
            "settings": self.settings,
            "episodes": [dataclasses.asdict(episode) for episode in self.episodes],
        }
        write_json(folder / _JSON_NAME, content)
        with whole_file(folder / "episodes.csv") as partial, partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [f.name for f in dataclasses.fields(EpisodeResult)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(episode) for episode in self.episodes)

    def save_part(self, folder: Path) -> None:
        """Write the report and the actions, so that :meth:`load_part` and the evaluation can go on.

        Args:
            folder: made if it does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # First: if this ends between the two, there are actions of every episode in the older report.
        with whole_file(folder / _ACTIONS_NAME) as partial, partial.open("wb") as stream:
            np.savez(stream, **dict(zip(self._names(), self.actions, strict=True)))  # type: ignore[arg-type]
        self.save(folder)

    @classmethod
    def load_part(cls, folder: Path) -> EvaluationReport:
        """Read what `save_part` wrote, actions included.

        Args:
            folder: of the evaluation.

        Raises:
            ValueError: there is none, it is damaged, or the evaluation was finished.
        """
        report, path = cls.load(folder), folder / _ACTIONS_NAME
        try:
            with np.load(path, allow_pickle=False) as actions:
                return dataclasses.replace(report, actions=[actions[name] for name in report._names()])
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds a finished evaluation: there is nothing to go on with.") from error
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): evaluate into another --out.") from error

    @staticmethod
    def finish(folder: Path) -> None:
        """Remove what only an evaluation that is not finished needs."""
        (folder / _ACTIONS_NAME).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        """Name each episode by its start, and how many came before from there."""
        counts: Counter[tuple[int, int]] = Counter()
        names = []
        for episode in self.episodes:
            start = episode.task_id, episode.init_state_id
            names.append("-".join(map(str, (*start, counts[start]))))
            counts[start] += 1
        return names

    @classmethod
    def load(cls, path: Path) -> EvaluationReport:
        """Read what `save` wrote.

        Args:
            path: `report.json`, or the folder that it lies in.

        Raises:
            ValueError: there is none, or it is something else.
        """
        file = report_file(path)
        if file is None:
            raise UserError(f"{path} holds no {_JSON_NAME}: name the folder that torchrl-vla evaluate wrote.")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                content["task_suite"],
                {int(task): entry["instruction"] for task, entry in content["tasks"].items()},
                [EpisodeResult(**episode) for episode in content["episodes"]],
                content["seconds"],
                content["settings"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{file} is not a report that torchrl-vla evaluate wrote ({error!r}).") from error


def report_file(path: Path) -> Path | None:
    """Return the `report.json` that a path means, itself or in its folder; None if there is none."""
    file = path / _JSON_NAME if path.is_dir() else path
    return file if file.is_file() and file.suffix == ".json" else None
