"""What the terms of a loss are averaged over: tokens, ratios of several tokens, decisions, or trajectories."""

from __future__ import annotations

from typing import Any, Literal

from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from torchrl_vla.errors import UserError
from torchrl_vla.objectives.masking import divide, masked_mean, valid_entries, zero_invalid

__all__ = ["Aggregation", "AveragedLoss", "Averages", "RatioLevel"]

RatioLevel = Literal["token", "action", "chunk"]
Aggregation = Literal["token", "trajectory"]


class Averages:
    """Reduce the terms of one batch over its valid tokens, ratios and decisions.

    Args:
        tokens: bool ``[*B, K, 7]``, which tokens count.
        batch_dims: the number of dimensions ``*B``.

    Keyword Args:
        ratio_level: what one ratio spans.
        reduction: of the losses: "mean", "sum" or "none".
        trajectory_tokens: ``[*B, 1]``, the valid tokens of each decision's trajectory, for losses in which all
            trajectories weigh the same; None: all tokens do.

    Examples:
        >>> import torch
        >>> averages = Averages(torch.ones(1, 2, 3, dtype=torch.bool), 1, ratio_level="action", reduction="mean")
        >>> averages.reduce_ratios(torch.tensor([[1.0, 2.0]])), averages.counts["tokens"]
        (tensor(1.5000), tensor(6))
    """

    def __init__(
        self,
        tokens: Tensor,
        batch_dims: int,
        *,
        ratio_level: RatioLevel,
        reduction: str,
        trajectory_tokens: Tensor | None = None,
    ) -> None:
        self.tokens = tokens
        self.batch_dims = batch_dims
        self.ratio_level = ratio_level
        self.reduction = reduction
        self.ratios = self.per_ratio(tokens).any(-1)
        self.decisions = self._per_decision(tokens).any(-1, keepdim=True)
        counts = {"ratios": self.ratios.sum(), "tokens": tokens.sum(), "decisions": self.decisions.sum()}
        self._token_weight: Tensor | None = None
        self._ratio_weight: Tensor | None = None
        if trajectory_tokens is not None:
            length = trajectory_tokens.double().clamp_min(1)
            self._token_weight = tokens / length.reshape(*length.shape[:-1], *(1,) * (tokens.ndim - batch_dims))
            # A ratio of several tokens weighs what they do.
            self._ratio_weight = self.per_ratio(self._token_weight).sum(-1)
            counts["trajectories"] = self._token_weight.sum()
        #: What sums are divided by.
        self.counts: TensorDictBase = TensorDict(counts)

    def per_ratio(self, per_token: Tensor) -> Tensor:
        """Gather the tokens of each ratio in a new last dimension.

        Raises:
            ValueError: if tokens cannot be told apart into actions.
        """
        if self.ratio_level == "token":
            return per_token.unsqueeze(-1)
        if self.ratio_level == "chunk":
            return self._per_decision(per_token)
        if per_token.ndim != self.batch_dims + 2:
            raise UserError(
                f"ratio_level='action' needs log-probabilities [*B, K, 7], got {tuple(per_token.shape)} for a batch "
                f"with {self.batch_dims} dimension(s): use 'token' or 'chunk', or a policy with one per token."
            )
        return per_token

    def reduce_tokens(self, values: Tensor) -> Tensor:
        """Reduce a loss with one value per token."""
        return self._reduce(values, self.tokens, "tokens", self._token_weight)

    def reduce_ratios(self, values: Tensor) -> Tensor:
        """Reduce a loss with one value per ratio."""
        return self._reduce(values, self.ratios, "ratios", self._ratio_weight)

    def reduce_decisions(self, values: Tensor) -> Tensor:
        """Reduce a loss with one value per decision, ``[*B, 1]``; decisions always weigh the same."""
        reduced = self._reduce(values, self.decisions, "decisions", None)
        return reduced.squeeze(-1) if self.reduction == "none" else reduced

    def mean_of_tokens(self, values: Tensor) -> Tensor:
        """Average a diagnostic with one value per token."""
        return masked_mean(values, self.tokens, self.counts["tokens"])

    def mean_of_decisions(self, values: Tensor) -> Tensor:
        """Average a diagnostic with one value per decision, ``[*B, 1]``."""
        return masked_mean(values, self.decisions, self.counts["decisions"])

    def _reduce(self, values: Tensor, valid: Tensor, unit: str, weight: Tensor | None) -> Tensor:
        values = zero_invalid(values, valid)
        if weight is not None:
            values, unit = values * weight.to(values.dtype), "trajectories"
        if self.reduction == "none":
            return values
        return values.sum() if self.reduction == "sum" else divide(values.sum(), self.counts[unit])

    def _per_decision(self, per_token: Tensor) -> Tensor:
        """Gather the tokens of each decision in one last dimension."""
        return per_token.unsqueeze(-1).flatten(self.batch_dims)


class AveragedLoss(LossModule):
    """A loss whose terms are averages over the valid tokens of a batch, or of a larger batch that it is a part of."""

    ratio_level: RatioLevel
    aggregation: Aggregation
    reduction: str
    normalize_advantage: bool
    tensor_keys: Any
    _normalizer: TensorDictBase | None = None

    def valid_tokens(self, tensordict: TensorDictBase) -> Tensor:
        """Say which tokens count: those of executed actions, in decisions and actions that no mask leaves out.

        Args:
            tensordict: a batch ``[*B]`` with log-probabilities ``[*B, K, 7]`` and, if any, masks and
                ``("next", "num_control_steps")``.

        Returns:
            bool, of the log-probabilities' shape; stored as ``mask`` it says the same to a later call.

        Raises:
            ValueError: if a mask does not fit the log-probabilities.
        """
        log_prob = tensordict.get(self.tensor_keys.sample_log_prob)
        return valid_entries(
            tensordict,
            log_prob.shape,
            masks=(self.tensor_keys.mask, *self._loss_mask_keys()),
            num_control_steps=self.tensor_keys.num_control_steps,
            device=log_prob.device,
        )

    def count_valid(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Count what the terms of the loss average over, without a forward.

        Args:
            tensordict: a batch with log-probabilities ``[*B, K, 7]`` and what :meth:`valid_tokens` reads.

        Returns:
            The number of valid ``"ratios"``, ``"tokens"`` and ``"decisions"``, integers, and, where those weigh the
            same, of ``"trajectories"``, float64: the sum of the parts of trajectories that the batch holds. Processes
            that share a batch sum them (and divide by their number where gradients are averaged).
        """
        return self._averages(tensordict).counts

    def set_normalizer(self, counts: TensorDictBase | None) -> None:
        """Divide the sums of the following calls by the counts of a larger batch, so that they add up to its loss.

        :func:`~torchrl_vla.objectives.combining.combine` makes one of the calls' diagnostics; for it, a critic's calls
        return more entries.

        Args:
            counts: what :meth:`count_valid` says of the whole batch; None returns to each call's own mean.

        Raises:
            ValueError: if the calls would not add up: ``reduction`` is not "mean", or ``normalize_advantage``.

        Examples:
            >>> loss.set_normalizer(loss.count_valid(batch))  # doctest: +SKIP
            >>> for micro_batch in batch.split(8):  # doctest: +SKIP
            ...     sum_losses(loss(micro_batch)).backward()
        """
        if counts is not None and self.reduction != "mean":
            raise UserError(f"reduction={self.reduction!r} divides by nothing: a normalizer needs reduction='mean'.")
        if counts is not None and self.normalize_advantage:
            raise UserError(
                "normalize_advantage=True looks at each call by itself, so that micro-batches do not add up to their "
                "batch: normalise where the advantage is computed, such as by GAE(average_gae=True)."
            )
        self._normalizer = counts

    def _averages(self, tensordict: TensorDictBase) -> Averages:
        length = None
        if self.aggregation == "trajectory":
            length = tensordict.get(self.tensor_keys.trajectory_tokens, None)
            if length is None:
                raise KeyError(
                    f"aggregation='trajectory' reads {self.tensor_keys.trajectory_tokens!r} [*B, 1], the number of "
                    "valid tokens of a decision's episode: fill the buffer through GRPOAdvantage, which writes it."
                )
        return Averages(
            self.valid_tokens(tensordict),
            tensordict.ndim,
            ratio_level=self.ratio_level,
            reduction=self.reduction,
            trajectory_tokens=length,
        )
