"""Progress bars of long work."""

from __future__ import annotations

from tqdm import tqdm

from torchrl_vla.collectors import Progress

__all__ = ["EpisodeBar"]


class EpisodeBar:
    """A progress bar over the episodes of a collection, to be called after every decision.

    Args:
        name: what is being collected.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm | None = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(total=progress.planned_episodes, desc=self._name, unit="episode", position=1, leave=False)
        self._bar.n = progress.episodes
        self._bar.set_postfix(decisions=progress.decisions, successes=progress.successes)
        if progress.episodes == progress.planned_episodes:
            self._bar.close()
            self._bar = None
