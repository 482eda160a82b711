"""How far a run and its parts have come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from torchrl_vla.collectors import Progress

__all__ = ["EpisodeBar", "RunProgress"]


@dataclass
class RunProgress:
    """How far a run has come.

    Args:
        updates: updates done.
        env_steps: control steps collected.
        best_success: highest success rate of its validations; -1 before the first.

    Examples:
        >>> progress = RunProgress(updates=1, env_steps=90)
        >>> progress.count(30)
        >>> progress.updates, progress.passed(100), progress.passed(1000)
        (2, True, False)
    """

    updates: int = 0
    env_steps: int = 0
    best_success: float = -1.0

    def __post_init__(self) -> None:
        self._before = self.env_steps

    def __str__(self) -> str:
        return f"update {self.updates}, {self.env_steps:,} control steps"

    def count(self, env_steps: int) -> None:
        """Add an update that collected so many control steps."""
        self._before = self.env_steps
        self.env_steps += env_steps
        self.updates += 1

    def passed(self, interval: int) -> bool:
        """Whether the last update reached a multiple of the interval, in control steps; never for an interval of 0."""
        return interval > 0 and self.env_steps // interval > self._before // interval

    def is_best(self, success: float) -> bool:
        """Take note of a validation's success rate; True if none was higher before."""
        best = success > self.best_success
        self.best_success = max(success, self.best_success)
        return best

    def state_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.updates, self.env_steps = int(state["updates"]), int(state["env_steps"])
        self.best_success, self._before = float(state["best_success"]), int(state["env_steps"])


class EpisodeBar:
    """A progress bar over the episodes of a collection, to be called after every decision.

    Args:
        name: what is being collected.
        check: called after every decision too; may raise to end the collection.
    """

    def __init__(self, name: str, check: Callable[[], None] | None = None) -> None:
        self._name = name
        self._check = check
        self._bar: tqdm | None = None

    def __call__(self, progress: Progress) -> None:
        """Show how far the collection has come, and check."""
        if self._bar is None:
            self._bar = tqdm(total=progress.planned_episodes, desc=self._name, unit="episode", position=1, leave=False)
        self._bar.n = progress.episodes
        self._bar.set_postfix(decisions=progress.decisions, successes=progress.successes)
        if progress.episodes == progress.planned_episodes:
            self._bar.close()
            self._bar = None
        if self._check is not None:
            self._check()
