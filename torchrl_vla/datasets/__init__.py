"""Demonstrations on disk: episodes as memory-mapped TensorDicts, their statistics, and samples to learn from.

What only readers need (policies' tokenizers, seconds to import) is imported when it is asked for: a process that
records episodes starts without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchrl_vla.datasets.episodes import CorruptEpisodeError, Episode, read_episode, write_episode

if TYPE_CHECKING:
    from torchrl_vla.datasets.demonstrations import DemonstrationDataset, DemonstrationIndex
    from torchrl_vla.datasets.mixture import DemonstrationMixture
    from torchrl_vla.datasets.statistics import compute_statistics

__all__ = [
    "CorruptEpisodeError",
    "DemonstrationDataset",
    "DemonstrationIndex",
    "DemonstrationMixture",
    "Episode",
    "compute_statistics",
    "read_episode",
    "write_episode",
]

_MODULES = {
    "DemonstrationDataset": "demonstrations",
    "DemonstrationIndex": "demonstrations",
    "DemonstrationMixture": "mixture",
    "compute_statistics": "statistics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
