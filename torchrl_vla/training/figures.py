"""The figures of a run by the names that its logs have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_vla.distributed.ranks import ALONE, OneProcess

__all__ = ["group_figures", "nothing_to_learn", "rollout_figures", "step_figures", "update_figures"]

#: TorchRL's names of the loss's terms -> the names in the logs.
_NAMES = {
    "loss_objective": "policy_loss",
    "loss_critic": "weighted_value_loss",
    "loss_entropy": "entropy_loss",
    "loss_kl": "kl_loss",
    "clip_fraction": "clipfrac",
    "kl_approx": "approx_kl",
}


def rollout_figures(batch: TensorDictBase, seconds: float, ranks: OneProcess = ALONE) -> dict[str, float]:
    """Return what was collected, by all processes together.

    Args:
        batch: decisions, of any shape, with ``("next", "done")`` and ``("next", "reward")``.
        seconds: that collecting took.
        ranks: the processes, each with a batch of its own.

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[False], [True]])
        >>> figures = rollout_figures(TensorDict({"next": {"done": done, "reward": done.float()}}, [2]), 4.0)
        >>> figures["rollout/mean_return"], figures["time/rollout_decisions_per_second"]
        (1.0, 0.5)
    """
    data = batch.reshape(-1)
    ended = data["next", "done"].reshape(-1)
    steps, success = (data.get(("next", name), None) for name in ("num_control_steps", "success"))
    successes = 0 if success is None else int(success.reshape(-1)[ended].sum())
    counted = [int(ended.sum()), len(data) if steps is None else int(steps.sum()), len(data), successes]
    sums = torch.tensor([*counted, float(data["next", "reward"].sum())], dtype=torch.float64)
    ranks.sum_([sums])
    episodes, env_steps, decisions, successes = (int(value) for value in sums[:4])
    figures = {
        "rollout/env_steps": env_steps,
        "rollout/num_trajectories": episodes,
        "rollout/mean_length": env_steps / max(episodes, 1),
        "rollout/mean_return": float(sums[4]) / max(episodes, 1),
        "rollout/collection_time": seconds,
        "time/rollout_seconds": seconds,
        "time/rollout_decisions_per_second": decisions / seconds,
    }
    if success is not None:
        figures["rollout/success_rate"] = successes / max(episodes, 1)
    return figures


def group_figures(stats: Mapping[str, float]) -> dict[str, float]:
    """Return what became of the groups of a batch.

    Args:
        stats: of :meth:`~torchrl_vla.objectives.GRPOAdvantage.get_stats`; those of another transform are left out.
    """
    names = {"groups": "groups", "kept": "groups_kept"}
    names |= {name: name for name in ("advantage_mean", "advantage_std", "advantage_nonzero")}
    names |= {name: f"groups_{name}" for name in stats if name.startswith("dropped_") and "groups" in stats}
    return {f"rollout/{shown}": stats[name] for name, shown in names.items() if name in stats}


def step_figures(steps: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Average the figures of optimizer steps, by their names in the logs; those that some lack (NaN) over the others.

    Args:
        steps: at least one, as :class:`~torchrl_vla.training.optimizer_step.OptimizerStep` returns them.
    """
    means = {name: float(torch.stack([step[name] for step in steps]).nanmean()) for name in steps[0]}
    return {f"train/{_NAMES.get(name, name)}": value for name, value in means.items()}


def update_figures(
    steps: Sequence[Mapping[str, Tensor]], *, decisions: int, epochs: int, episodes: int, kept: int, seconds: float
) -> dict[str, float]:
    """Return what an update did: means over its optimizer steps, each over those that have the figure (not NaN).

    Args:
        steps: at least one, as :class:`~torchrl_vla.training.optimizer_step.OptimizerStep` returns them.

    Keyword Args:
        decisions: learned from, each in every epoch.
        epochs: passes over them.
        episodes: collected.
        kept: of these, episodes that were learned from.
        seconds: that it took.
    """
    return {
        **step_figures(steps),
        "train/decisions": decisions,
        "train/episodes": kept,
        "train/dropped_episodes": episodes - kept,
        "train/optimizer_steps": len(steps),
        "time/update_seconds": seconds,
        "time/update_decisions_per_second": epochs * decisions / seconds,
    }


def nothing_to_learn(stats: Mapping[str, float]) -> str:
    """Say why a batch left nothing to learn from.

    Args:
        stats: as for :func:`group_figures`.
    """
    if "dropped_all_failed" not in stats:
        return "The buffer's transforms dropped every decision: the policy stays as it is in this update."
    return (
        f"No group had both outcomes ({stats['dropped_all_failed']} failed throughout, "
        f"{stats['dropped_all_succeeded']} succeeded throughout, {stats['dropped_out_of_bounds']} outside the bounds, "
        f"{stats['dropped_incomplete']} with too few whole episodes): there is nothing to learn from in this update, "
        "and the policy stays as it is."
    )
