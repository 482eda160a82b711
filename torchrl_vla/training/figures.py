"""The figures of a run by the names that its logs have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

__all__ = ["group_figures", "nothing_to_learn", "rollout_figures", "update_figures"]

#: TorchRL's names of the loss's terms -> the names in the logs.
_NAMES = {
    "loss_objective": "policy_loss",
    "loss_critic": "weighted_value_loss",
    "loss_entropy": "entropy_loss",
    "loss_kl": "kl_loss",
    "clip_fraction": "clipfrac",
    "kl_approx": "approx_kl",
}


def rollout_figures(batch: TensorDictBase, seconds: float) -> dict[str, float]:
    """What was collected.

    Args:
        batch: decisions, of any shape, with ``("next", "done")`` and ``("next", "reward")``.
        seconds: that collecting took.

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[False], [True]])
        >>> figures = rollout_figures(TensorDict({"next": {"done": done, "reward": done.float()}}, [2]), 4.0)
        >>> figures["rollout/mean_return"], figures["time/rollout_decisions_per_second"]
        (1.0, 0.5)
    """
    data = batch.reshape(-1)
    ended = data["next", "done"].reshape(-1)
    episodes = int(ended.sum())
    steps = data.get(("next", "num_control_steps"), None)
    env_steps = int(steps.sum()) if steps is not None else len(data)
    figures = {
        "rollout/env_steps": env_steps,
        "rollout/num_trajectories": episodes,
        "rollout/mean_length": env_steps / max(episodes, 1),
        "rollout/mean_return": float(data["next", "reward"].sum()) / max(episodes, 1),
        "rollout/collection_time": seconds,
        "time/rollout_seconds": seconds,
        "time/rollout_decisions_per_second": len(data) / seconds,
    }
    success = data.get(("next", "success"), None)
    if success is not None:
        figures["rollout/success_rate"] = float(success.reshape(-1)[ended].float().sum()) / max(episodes, 1)
    return figures


def group_figures(stats: Mapping[str, float]) -> dict[str, float]:
    """What became of the groups of a batch.

    Args:
        stats: of :meth:`~torchrl_vla.objectives.GRPOAdvantage.get_stats`; those of another transform are left out.
    """
    names = {"groups": "groups", "kept": "groups_kept"}
    names |= {name: name for name in ("advantage_mean", "advantage_std", "advantage_nonzero")}
    names |= {name: f"groups_{name}" for name in stats if name.startswith("dropped_") and "groups" in stats}
    return {f"rollout/{shown}": stats[name] for name, shown in names.items() if name in stats}


def update_figures(steps: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Means over the optimizer steps of an update; figures that some steps lack (NaN) are of those that have them.

    Args:
        steps: at least one, as :class:`~torchrl_vla.training.optimizer_step.OptimizerStep` returns them.
    """
    means = {name: float(torch.stack([step[name] for step in steps]).nanmean()) for name in steps[0]}
    return {f"train/{_NAMES.get(name, name)}": value for name, value in means.items()}


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
