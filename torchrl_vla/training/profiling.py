"""A trace of one update of a run, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["UpdateProfiler"]


class UpdateProfiler:
    """Records one update, rollout included, with torch.profiler, into ``profile-update-N.json`` of the run's folder.

    Args:
        folder: of the run.
        update: which one, counted from 1 and from where this process began; None: none.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with UpdateProfiler(folder, 2) as profiler:
        ...     for _ in range(3):
        ...         profiler.next_update()
        ...         _ = torch.ones(2) + 1
        >>> [path.name for path in folder.iterdir()]
        ['profile-update-2.json']
    """

    def __init__(self, folder: Path, update: int | None) -> None:
        self.folder, self.update = folder, update
        self._begun = 0
        self._profile: profile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def next_update(self) -> None:
        """Say that an update begins."""
        self._finish()
        self._begun += 1
        if self._begun == self.update:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()

    def _finish(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self.folder / f"profile-update-{self.update}.json"))
            self._profile = None
