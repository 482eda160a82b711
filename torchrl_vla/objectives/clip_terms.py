"""The terms of the clipped objective, as functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives import distance_loss

from torchrl_vla.objectives.combining import explained_variance
from torchrl_vla.objectives.masking import effective_sample_size, expand_mask, masked_mean, zero_invalid

#: Beyond this, exp() of a difference of log-probabilities overflows sooner or later, and its gradient is NaN.
MAX_LOG_RATIO = 20.0


def valid_log_prob(
    actor: ProbabilisticTensorDictSequential, tensordict: TensorDictBase, action: Tensor, valid: Tensor
) -> tuple[Tensor, Distribution]:
    """Log-probabilities of stored actions, and the distribution, with zeros for invalid actions and parameters.

    Args:
        actor: makes the distribution.
        tensordict: what the actor reads; it writes its other outputs there.
        action: the tokens, such as int64 ``[*B, K, 7]``.
        valid: bool, of the log-probabilities' shape.
    """
    if isinstance(actor, ProbabilisticTensorDictSequential) and not actor.return_composite:
        parameters = actor.get_dist_params(tensordict)
        for key in actor.dist_params_keys:
            value = parameters.get(key)
            if value.shape[: valid.ndim] == valid.shape:
                parameters.set(key, zero_invalid(value, expand_mask(valid, value.shape)))
        dist = actor.build_dist_from_params(parameters)
    else:
        dist = actor.get_dist(tensordict)
    if action.shape[: valid.ndim] == valid.shape:
        action = zero_invalid(action, expand_mask(valid, action.shape))
    return dist.log_prob(action), dist


def clipped_gain(
    log_ratio: Tensor, advantage: Tensor, bounds: tuple[Tensor, Tensor], dual_clip: float | None
) -> Tensor:
    """PPO's gain ``min(r A, clip(r) A)``; with ``dual_clip``, at least ``dual_clip * A`` where A is negative.

    Args:
        log_ratio: of new to old, any shape, within ``MAX_LOG_RATIO``.
        advantage: of that shape.
        bounds: logarithms of the lowest and highest ratio.
        dual_clip: above 1, or None.
    """
    gain = torch.minimum(log_ratio.exp() * advantage, log_ratio.clamp(*bounds).exp() * advantage)
    if dual_clip is None:
        return gain
    return torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)


@torch.no_grad()
def ratio_figures(log_ratio: Tensor, valid: Tensor, bounds: tuple[Tensor, Tensor], count: Tensor) -> dict[str, Tensor]:
    """How far the ratios are from 1: clip fraction, approximate KL, effective sample size, largest and mean.

    Args:
        log_ratio: of new to old, any shape.
        valid: bool, of that shape.
        bounds: logarithms of the lowest and highest ratio.
        count: what the means divide by.
    """
    limited = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = zero_invalid(limited.exp(), valid)
    clipped = (log_ratio.clamp(*bounds) != log_ratio).to(log_ratio.dtype)
    return {
        "clip_fraction": masked_mean(clipped, valid, count),
        "kl_approx": masked_mean(-log_ratio, valid, count),
        "ESS": effective_sample_size(limited, valid),
        "max_ratio": ratio.amax(),
        "mean_ratio": masked_mean(ratio, valid, count),
        "num_ratios": valid.sum(),
    }


def k3(log_ratio: Tensor) -> Tensor:
    """Return the k3 estimator ``r - log r - 1`` of the KL from the policy to a reference.

    Args:
        log_ratio: of the reference to the policy, at the policy's actions.

    Source: http://joschu.net/blog/kl-approx.html
    """
    # From below nothing overflows, and the gradient there is what pulls the policy back.
    log_ratio = log_ratio.clamp(max=MAX_LOG_RATIO)
    return log_ratio.exp() - log_ratio - 1


def value_error(
    value: Tensor, target: Tensor, old_value: Tensor | None, clip_value: Any, kind: str
) -> tuple[Tensor, Tensor | None]:
    """Distance between values and their targets, and which changes of the value were clipped.

    Args:
        value: ``[*B, 1]``.
        target: of that shape.
        old_value: the rollout's, of that shape; read where ``clip_value`` is given.
        clip_value: largest change from ``old_value`` that lowers the loss, a number or scalar tensor, or None.
        kind: "l1", "l2" or "smooth_l1".
    """
    error = distance_loss(target, value, loss_function=kind)
    if clip_value is None or old_value is None:
        return error, None
    change = value - old_value
    clipped = change.clamp(-clip_value, clip_value)
    bounded = distance_loss(target, old_value + clipped, loss_function=kind)
    return torch.maximum(error, bounded), (change != clipped).to(value.dtype)


@torch.no_grad()
def value_moments(value: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Return what the explained variance of a batch in parts is formed from, and that of this part."""
    moments = {"num_values": valid.sum()}
    for name, values in {"target": target, "residual": target - value}.items():
        mean = masked_mean(values, valid)
        moments[f"{name}_mean"] = mean
        moments[f"{name}_variance"] = masked_mean((values - mean).square(), valid)
    return {"explained_variance": explained_variance(moments), **moments}
