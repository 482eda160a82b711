"""The figures of a batch from those of its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

__all__ = ["average", "combine", "explained_variance"]

#: What the explained variance of a batch is formed from, of each micro-batch.
_MOMENTS = ("num_values", "target_mean", "target_variance", "residual_mean", "residual_variance")


def explained_variance(moments: Mapping[str, Tensor]) -> Tensor:
    """One minus the residuals' variance over the targets'.

    Args:
        moments: of a batch in parts: ``num_values``, and mean and variance of ``target`` and ``residual``. Each holds
            one value per part, and parts without a value count nowhere.
    """
    share = moments["num_values"] / moments["num_values"].sum().clamp_min(1)

    def variance(name: str) -> Tensor:
        # Within the parts and between them: sums of squares would lose what matters if the mean is large.
        mean = moments[f"{name}_mean"]
        return (share * (moments[f"{name}_variance"] + (mean - (share * mean).sum()).square())).sum()

    spread = variance("target")
    return 1 - variance("residual") / (spread + torch.finfo(spread.dtype).eps)


def combine(parts: Sequence[Mapping[str, Tensor] | TensorDictBase]) -> dict[str, Tensor]:
    """Return the losses and diagnostics of a batch, from those of its micro-batches.

    Args:
        parts: what each call of an :class:`~torchrl_vla.objectives.AsymmetricClipPPOLoss` returned, after
            :meth:`~torchrl_vla.objectives.AsymmetricClipPPOLoss.set_normalizer` with the counts of the batch.

    Examples:
        >>> loss.set_normalizer(loss.count_valid(batch))  # doctest: +SKIP
        >>> figures = combine([loss(part) for part in batch.split(8)])  # doctest: +SKIP
    """
    values = {name: torch.stack([part[name] for part in parts]) for name in parts[0].keys()}
    terms = {name: value.sum() for name, value in values.items() if name not in _MOMENTS}
    if "ESS" in values:
        terms["max_ratio"] = values["max_ratio"].amax()
        # The means are the sums over one number, which cancels, and so does the largest, for finite squares. A
        # part's sum of squares follows from its ESS, which leaves at least one sample.
        sums = values["mean_ratio"] / values["mean_ratio"].amax().clamp_min(torch.finfo(torch.float32).tiny)
        squares = (sums.square() / (values["num_ratios"] * values["ESS"]).clamp_min(1)).sum()
        smallest = torch.finfo(squares.dtype).tiny
        terms["ESS"] = sums.sum().square() / (squares * terms["num_ratios"]).clamp_min(smallest)
    if "explained_variance" in values:
        terms["explained_variance"] = explained_variance(values)
    return terms


def average(parts: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Return the losses and diagnostics of a batch, from those of a loss that divides by its micro-batch.

    Args:
        parts: each micro-batch's share of the batch, and what the loss returned for it.

    Examples:
        >>> one, two = ({"loss": torch.tensor(x), "max_ratio": torch.tensor(x)} for x in (1.0, 2.0))
        >>> average([(0.75, one), (0.25, two)])
        {'loss': tensor(1.2500), 'max_ratio': tensor(2.)}
    """
    values = {name: torch.stack([part[name] for _, part in parts]) for name in parts[0][1]}
    shares = torch.tensor([share for share, _ in parts], device=values["loss"].device)
    return {name: value.amax() if name == "max_ratio" else shares @ value for name, value in values.items()}
