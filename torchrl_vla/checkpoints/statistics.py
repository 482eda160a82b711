"""``dataset_statistics.json``, which gives actions and states their units: its only reader and its only writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl_vla.files import read_json, write_json
from torchrl_vla.modules.action_tokenizer import ActionTokenizer

__all__ = ["STATISTICS_FILE", "action_tokenizer", "add_statistics", "read_statistics", "write_statistics"]

STATISTICS_FILE = "dataset_statistics.json"


def read_statistics(folder: str | Path) -> dict[str, Any]:
    """Read a folder's statistics by data set; none where it has no such file.

    Args:
        folder: of a checkpoint or a data set.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / STATISTICS_FILE
    return read_json(path) if path.exists() else {}


def write_statistics(folder: str | Path, statistics: Mapping[str, Any]) -> None:
    """Write a folder's statistics, in the place of those that are there.

    Args:
        folder: of a checkpoint or a data set.
        statistics: by data set.
    """
    write_json(Path(folder) / STATISTICS_FILE, dict(statistics), indent=1)


def action_tokenizer(
    statistics: Mapping[str, Any], key: str, *, source: Path, n_bins: int = 256, vocab_size: int = 32000
) -> ActionTokenizer:
    """Make the action tokenizer of one data set.

    Args:
        statistics: by data set, as :func:`read_statistics` or ``OpenVLAConfig.statistics`` has them.
        key: name of the data set, e.g. ``"libero_spatial"``; ``key + "_no_noops"`` is tried next.
        source: the folder that they are of, for messages.
        n_bins: as for :class:`ActionTokenizer`.
        vocab_size: as for :class:`ActionTokenizer`.

    Raises:
        ValueError: there are none, or none of that name, or they are damaged.

    Examples:
        >>> entry = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}
        >>> action_tokenizer({"libero_goal_no_noops": entry}, "libero_goal", source=Path("policy")).n_bins
        256
    """
    if not statistics:
        raise ValueError(
            f"{source} holds no action statistics: neither {STATISTICS_FILE} nor 'norm_stats' in config.json. Take "
            "dataset_statistics.json of a release fine-tuned on the same data."
        )
    for name in _names(key):
        if name in statistics:
            try:
                return ActionTokenizer(statistics[name], n_bins=n_bins, vocab_size=vocab_size)
            except ValueError as error:
                raise ValueError(f"the statistics of {name!r} in {source} are damaged: {error}") from error
    raise ValueError(
        f"No statistics for {key!r} in {source}; it has: {', '.join(sorted(statistics))}. Name the ones that the "
        "policy was trained with (--unnorm-key), or put the dataset_statistics.json of a release fine-tuned on "
        "the same data into the folder."
    )


def add_statistics(statistics: Mapping[str, Any], key: str, tokenizer: ActionTokenizer) -> dict[str, Any]:
    """Add a data set's percentiles to the statistics of a checkpoint.

    Args:
        statistics: by data set. An entry of this one with the same percentiles stays: upstream's entries have more.
        key: name of the data set.
        tokenizer: has its percentiles.
    """
    own = tokenizer.statistics()
    if any(name in statistics and ActionTokenizer(statistics[name]).statistics() == own for name in _names(key)):
        return dict(statistics)
    return {**statistics, key: own}


def _names(key: str) -> tuple[str, str]:
    """Those that a data set's statistics go by: upstream's data sets have no steps in which nothing moves."""
    return key, f"{key}_no_noops"
