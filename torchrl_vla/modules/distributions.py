"""The distribution of a chunk of action tokens."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl


class TokenCategorical(Distribution):
    """Independent categoricals over bins, with a temperature and by default one log-probability per token.

    Args:
        logits: unnormalised log-probabilities ``[*B, K, 7, n_bins]`` at temperature 1; computed with in float32.
        temperature: divides the logits. 0 is greedy: all the mass is on the most likely bin.
        event_dims: how many of the last token dimensions make one event, over which log-probabilities, entropy and
            divergence are summed: 0 gives ``[*B, K, 7]`` (per token), 1 ``[*B, K]`` (per action), 2 ``[*B]`` (per
            chunk).
        validate_args: as for every torch distribution.

    Raises:
        ValueError: if the temperature is negative or not finite, or the logits have too few dimensions.

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

    def __init__(
        self, logits: Tensor, temperature: float = 1.0, event_dims: int = 0, validate_args: bool | None = None
    ) -> None:
        check_temperature(temperature)
        if not 0 <= event_dims < logits.ndim:
            raise ValueError(
                f"event_dims must be from 0 to {logits.ndim - 1} for logits {list(logits.shape)}, got {event_dims}."
            )
        self.logits = logits.float()
        self.temperature = temperature
        self.event_dims = event_dims
        tokens = logits.shape[:-1]
        split = len(tokens) - event_dims
        super().__init__(tokens[:split], tokens[split:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The bins, integers in [0, n_bins - 1]."""
        bins = constraints.integer_interval(0, self.logits.shape[-1] - 1)
        return constraints.independent(bins, self.event_dims)

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
        shape, tokens = torch.Size(sample_shape), self.logits.shape[:-1]
        if self.temperature == 0:
            return self.mode.expand(shape + tokens)
        with torch.no_grad():
            uniform = torch.rand((*tokens, shape.numel()), device=self.logits.device)
            return draw_bins(self.probs, uniform).movedim(-1, 0).reshape(shape + tokens)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each event of ``value`` (int64 ``[..., *B, K, 7]``), float32."""
        if self._validate_args:
            self._validate_sample(value)
        log_probs = self.log_probs.expand(value.shape + self.logits.shape[-1:])
        return self._sum_event(log_probs.gather(-1, value.unsqueeze(-1)).squeeze(-1))

    def entropy(self) -> Tensor:
        """Entropy of each event in nats, float32."""
        # Bins out of reach (log-probability -inf) add nothing, where 0 * inf would be NaN.
        floor = torch.finfo(self.log_probs.dtype).min
        return self._sum_event(-(self.probs * self.log_probs.clamp(min=floor)).sum(-1))

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: TokenCategorical | None = None
    ) -> TokenCategorical:
        """The same distribution, broadcast to ``batch_shape``."""
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape + self.logits.shape[-1:])
        return TokenCategorical(logits, self.temperature, self.event_dims, validate_args=self._validate_args)

    def _sum_event(self, per_token: Tensor) -> Tensor:
        return per_token.flatten(-self.event_dims).sum(-1) if self.event_dims else per_token


@register_kl(TokenCategorical, TokenCategorical)
def _kl_token_categorical(p: TokenCategorical, q: TokenCategorical) -> Tensor:
    terms = p.probs * (p.log_probs - q.log_probs)
    return p._sum_event(torch.where(p.probs > 0, terms, 0.0).sum(-1))


def draw_bins(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw bins by inverse transform: one uniform number per draw, where multinomial draws one per bin.

    Args:
        probs: probability of every bin, ``[..., n_bins]``.
        uniform: numbers in [0, 1), ``[..., draws]``.

    Returns:
        Bins int64 ``[..., draws]``.

    Examples:
        >>> draw_bins(torch.tensor([0.25, 0.0, 0.75]), torch.tensor([0.0, 0.2, 0.25, 0.9]))
        tensor([0, 0, 2, 2])
    """
    # The product stays below the last cumulative value and right=True steps over bins of no mass, so that none of
    # those is drawn.
    cumulative = probs.cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)


def check_temperature(value: float) -> None:
    """Raise a ValueError unless the value is a temperature."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"temperature must be finite and >= 0 (0 is greedy), got {value}.")
