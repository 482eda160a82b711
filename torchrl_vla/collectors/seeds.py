"""Random numbers that belong to an episode: whoever runs it, wherever, beside whatever else, draws the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchrl_vla.collectors.plan import Episode
from torchrl_vla.errors import UserError
from torchrl_vla.modules.distributions import mix_seed

__all__ = ["decision_seeds", "episode_seeds"]


def episode_seeds(seed: int, number: int, plan: Sequence[Episode]) -> Tensor:
    """Derive a seed for each episode, int64 ``[n]``.

    Args:
        seed: the run's.
        number: which of the run's collections it is, so that a plan that is run again draws other numbers.
        plan: the episodes; each seed depends on the episode's ``group_id`` and ``member`` alone.

    Raises:
        ValueError: if two of the episodes would draw the same numbers, or a seed or number is negative.

    Examples:
        >>> plan = [Episode(7, 0, 3, member) for member in range(4)]
        >>> torch.equal(episode_seeds(0, 2, plan)[1::2], episode_seeds(0, 2, plan[1::2]))
        True
    """
    if seed < 0 or number < 0:
        raise UserError(f"seed={seed} and number={number} must not be negative.")
    names = [(episode.group_id, episode.member) for episode in plan]
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise UserError(
            f"Member {twice[1]} of group {twice[0]} is planned twice, and would draw the same random numbers twice: "
            "number the members of a group (Episode.member), as EpisodePlan does."
        )
    words = [np.random.SeedSequence(seed, spawn_key=(number, *name)).generate_state(1, np.uint64)[0] for name in names]
    return torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64))


def decision_seeds(episodes: Tensor, decisions: Tensor) -> Tensor:
    """Derive the seeds of some episodes' decisions.

    Args:
        episodes: the episodes' seeds, int64 ``[n]``.
        decisions: the number of the decision in its episode, from 0, int64 ``[n]``.

    Returns:
        int64 ``[n, 1]``.
    """
    return mix_seed(episodes, decisions + 1).unsqueeze(-1)
