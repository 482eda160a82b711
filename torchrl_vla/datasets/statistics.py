"""Statistics of a data set's actions and states, in the format of OpenVLA's ``dataset_statistics.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from torchrl_vla.errors import UserError

__all__ = ["compute_statistics"]


def compute_statistics(actions: Sequence[np.ndarray], states: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean, standard deviation, extremes and 1st and 99th percentiles over all control steps.

    Args:
        actions: of each episode, [T, 7] in the environment's convention; the statistics are those of the data sets'
            convention, whose gripper is 0 closed and 1 open. The gripper is masked out: it is not normalised.
        states: of each episode, [T, 8].

    Returns:
        ``action`` and ``proprio`` with ``mean``, ``std``, ``min``, ``max``, ``q01``, ``q99``, ``mask`` for actions, and
        ``num_transitions`` and ``num_trajectories``.

    Raises:
        ValueError: if there is no episode.

    Source: OpenVLA's ``get_dataset_statistics`` (percentiles by NumPy's linear interpolation, population deviation).

    Examples:
        >>> actions = np.zeros((5, 7))
        >>> actions[:, 6] = 1.0  # close
        >>> compute_statistics([actions], [np.ones((5, 8))])["action"]["q99"][6]
        0.0
    """
    if not actions:
        raise UserError("there are no episodes to take statistics of.")
    moves = np.concatenate(actions).astype(np.float64)
    moves[:, -1] = 0.5 * (1.0 - moves[:, -1])
    mask = [True] * (moves.shape[1] - 1) + [False]
    return {
        "action": {**_summary(moves), "mask": mask},
        "proprio": _summary(np.concatenate(states).astype(np.float64)),
        "num_transitions": len(moves),
        "num_trajectories": len(actions),
    }


def _summary(values: np.ndarray) -> dict[str, list[float]]:
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    parts = {"mean": values.mean(0), "std": values.std(0), "max": values.max(0), "min": values.min(0)}
    return {name: array.tolist() for name, array in (parts | {"q01": q01, "q99": q99}).items()}
