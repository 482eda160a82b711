"""The distribution of a chunk of action tokens."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl


class TokenCategorical(Distribution):
    """Independent categoricals over bins, with a temperature and one log-probability per token.

    Args:
        logits: unnormalised log-probabilities ``[*B, K, 7, n_bins]`` at temperature 1; computed with in float32.
        temperature: divides the logits. 0 is greedy: all the mass is on the most likely bin.
        validate_args: as for every torch distribution.

    Raises:
        ValueError: if the temperature is negative or not finite, or the logits have no dimension.

    Source: the token probabilities of SimpleVLA-RL (arXiv:2509.09674), ``log_softmax(logits / temperature)``.

    Examples:
        >>> import torch
        >>> dist = TokenCategorical(torch.zeros(2, 8, 7, 256), temperature=1.6)
        >>> dist.log_prob(dist.sample()).shape
        torch.Size([2, 8, 7])
        >>> dist.entropy()[0, 0, 0]
        tensor(5.5452)
    """

    arg_constraints = {"logits": constraints.real_vector}
    has_rsample = False

    def __init__(self, logits: Tensor, temperature: float = 1.0, validate_args: bool | None = None) -> None:
        if not math.isfinite(temperature) or temperature < 0:
            raise ValueError(f"temperature must be finite and >= 0 (0 is greedy), got {temperature}.")
        if logits.ndim < 1:
            raise ValueError("logits must be [..., n_bins], got a scalar.")
        self.logits = logits.float()
        self.temperature = temperature
        super().__init__(batch_shape=logits.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The bins, integers in [0, n_bins - 1]."""
        return constraints.integer_interval(0, self.logits.shape[-1] - 1)

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probability of every bin, float32 ``[*B, K, 7, n_bins]``."""
        if self.temperature == 0:
            chosen = torch.zeros_like(self.logits, dtype=torch.bool).scatter_(-1, self.mode.unsqueeze(-1), True)
            return torch.zeros_like(self.logits).masked_fill_(~chosen, -math.inf)
        return torch.log_softmax(self.logits / self.temperature, dim=-1)

    @property
    def probs(self) -> Tensor:
        """Probability of every bin, float32 ``[*B, K, 7, n_bins]``."""
        return self.log_probs.exp()

    @property
    def mode(self) -> Tensor:
        """The most likely bins, int64 ``[*B, K, 7]``."""
        return self.logits.argmax(dim=-1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The most likely bins: what TorchRL takes under ``ExplorationType.DETERMINISTIC``."""
        return self.mode

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draw bins, int64 ``[*sample_shape, *B, K, 7]``."""
        shape = torch.Size(sample_shape)
        if self.temperature == 0:
            return self.mode.expand(shape + self.batch_shape)
        with torch.no_grad():
            # Inverse transform: one uniform number per token, where multinomial draws one per bin. The product stays
            # below the last cumulative value and right=True steps over bins of no mass, so none of those is drawn.
            cumulative = self.probs.cumsum(dim=-1)
            uniform = torch.rand((*self.batch_shape, shape.numel()), device=cumulative.device)
            drawn = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)
            return drawn.movedim(-1, 0).reshape(shape + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each token, float32 in the shape of ``value`` (int64 ``[..., *B, K, 7]``)."""
        if self._validate_args:
            self._validate_sample(value)
        log_probs = self.log_probs.expand(value.shape + self.logits.shape[-1:])
        return log_probs.gather(-1, value.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy of each token in nats, float32 ``[*B, K, 7]``."""
        # Bins out of reach (log-probability -inf) add nothing, where 0 * inf would be NaN.
        floor = torch.finfo(self.log_probs.dtype).min
        return -(self.probs * self.log_probs.clamp(min=floor)).sum(-1)

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: TokenCategorical | None = None
    ) -> TokenCategorical:
        """The same distribution, broadcast to ``batch_shape``."""
        shape = torch.Size(batch_shape) + self.logits.shape[-1:]
        return TokenCategorical(self.logits.expand(shape), self.temperature, validate_args=self._validate_args)


@register_kl(TokenCategorical, TokenCategorical)
def _kl_token_categorical(p: TokenCategorical, q: TokenCategorical) -> Tensor:
    terms = p.probs * (p.log_probs - q.log_probs)
    return torch.where(p.probs > 0, terms, 0.0).sum(-1)
