"""``dataset_statistics.json``, which gives actions and states their units: its only reader and its only writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl_vla.errors import UserError
from torchrl_vla.files import read_json, write_json
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.openvla.architecture import OpenVLAConfig

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


def action_tokenizer(config: OpenVLAConfig, key: str, *, source: Path) -> ActionTokenizer:
    """Make the action tokenizer of one data set, for a policy's action tokens, actions and states.

    Args:
        config: of the policy, with the statistics.
        key: name of the data set, e.g. ``"libero_spatial"``; ``key + "_no_noops"`` is tried next.
        source: the folder that they are of, for messages.

    Raises:
        ValueError: there are none, or none of that name, or they are damaged or of another robot.

    Examples:
        >>> entry = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}
        >>> config = OpenVLAConfig(norm_stats={"libero_goal_no_noops": entry})
        >>> action_tokenizer(config, "libero_goal", source=Path("policy")).action_q01.numel()
        7
    """
    statistics = config.statistics
    if not statistics:
        raise UserError(
            f"{source} holds no action statistics: neither {STATISTICS_FILE} nor 'norm_stats' in config.json. Take "
            "dataset_statistics.json of a release fine-tuned on the same data."
        )
    for name in _names(key):
        if name in statistics:
            try:
                tokenizer = ActionTokenizer(
                    statistics[name], n_bins=config.n_action_bins, vocab_size=config.tokenizer_vocab_size
                )
                _check_sizes(tokenizer, config)
            except ValueError as error:
                raise UserError(f"the statistics of {name!r} in {source} cannot be used: {error}") from error
            return tokenizer
    raise UserError(
        f"No statistics for {key!r} in {source}; it has: {', '.join(sorted(statistics))}. Name the ones that the "
        "policy was trained with (--unnorm-key), or put the dataset_statistics.json of a release fine-tuned on "
        "the same data into the folder."
    )


def _check_sizes(tokenizer: ActionTokenizer, config: OpenVLAConfig) -> None:
    if tokenizer.action_q01.numel() != config.action_dim:
        raise UserError(f"they are of {tokenizer.action_q01.numel()} actions, the policy has {config.action_dim}.")
    if not config.use_proprio:
        return
    if tokenizer.proprio_q01 is None:
        raise UserError("the policy reads the robot's state, but they have no 'proprio'.")
    if tokenizer.proprio_q01.numel() != config.proprio_dim:
        raise UserError(
            f"they are of states of {tokenizer.proprio_q01.numel()} numbers, the policy reads {config.proprio_dim}."
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
