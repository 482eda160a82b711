"""What an evaluation found: per task and in all, with intervals; as JSON, CSV and a line of text."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

__all__ = ["EpisodeResult", "EvaluationReport", "SuccessRate"]


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
        low, high = binomtest(self.successes, self.episodes).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} [{100 * low:.1f}, {100 * high:.1f}] ({self.successes}/{self.episodes})"


@dataclass
class EvaluationReport:
    """The episodes of one evaluation and how they were run.

    Args:
        task_suite: name of the suite.
        instructions: instruction by task id.
        episodes: every episode that was run.
        seconds: wall-clock time of the whole evaluation.
        settings: what the reader needs to repeat it: checkpoint, initial states, temperature, horizon, versions.
    """

    task_suite: str
    instructions: dict[int, str]
    episodes: Sequence[EpisodeResult]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> SuccessRate:
        """Success over all tasks."""
        return SuccessRate(sum(e.success for e in self.episodes), len(self.episodes))

    @property
    def tasks(self) -> dict[int, SuccessRate]:
        """Success by task id, in order."""
        by_task: dict[int, list[EpisodeResult]] = {}
        for episode in self.episodes:
            by_task.setdefault(episode.task_id, []).append(episode)
        return {task: SuccessRate(sum(e.success for e in rows), len(rows)) for task, rows in sorted(by_task.items())}

    def figures(self) -> dict[str, float]:
        """The figures of the whole evaluation, by name."""
        count = len(self.episodes)
        return {
            "success_rate": self.total.rate,
            "mean_length": sum(e.control_steps for e in self.episodes) / count,
            "decisions_per_episode": sum(e.decisions for e in self.episodes) / count,
            "seconds_per_episode": self.seconds / count,
        }

    def __str__(self) -> str:
        lines = [f"{self.task_suite}: {self.total}, {self.figures()['mean_length']:.0f} control steps per episode"]
        width = max(len(text) for text in self.instructions.values())
        lines += [f"  task {task:>2}  {self.instructions[task]:<{width}}  {rate}" for task, rate in self.tasks.items()]
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write `report.json` (everything) and `episodes.csv` (a row per episode).

        Args:
            folder: made if it does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tasks = {
            task: {
                "instruction": self.instructions[task],
                "success": str(rate),
                "rate": rate.rate,
                "interval": rate.interval,
            }
            for task, rate in self.tasks.items()
        }
        content = {
            "task_suite": self.task_suite,
            "success": str(self.total),
            "interval": self.total.interval,
            **self.figures(),
            "seconds": self.seconds,
            "tasks": tasks,
            "settings": self.settings,
            "episodes": [dataclasses.asdict(episode) for episode in self.episodes],
        }
        (folder / "report.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
        with (folder / "episodes.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [f.name for f in dataclasses.fields(EpisodeResult)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(episode) for episode in self.episodes)
