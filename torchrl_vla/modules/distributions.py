"""The distribution of a chunk of action tokens."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from torchrl_vla.errors import UserError

__all__ = ["SEED_KEY", "TokenCategorical", "check_temperature", "draw_bins", "mix_seed", "seeded_uniforms"]

#: Where a collector gives each decision a seed of its own, int64 ``[*B, 1]``, for the policy to sample with.
SEED_KEY: NestedKey = "decision_seed"


class TokenCategorical(Distribution):
    """Independent categoricals over bins, with a temperature and by default one log-probability per token.

    Args:
        logits: unnormalised log-probabilities ``[*B, K, 7, n_bins]`` at temperature 1; computed with in float32.
        temperature: divides the logits. 0 is greedy: all the mass is on the most likely bin.
        event_dims: how many of the last token dimensions make one event, over which log-probabilities, entropy and
            divergence are summed: 0 gives ``[*B, K, 7]`` (per token), 1 ``[*B, K]`` (per action), 2 ``[*B]`` (per
            chunk).
        validate_args: as for every torch distribution.
        seed: one per decision, int64 ``[*B, 1]`` (see :data:`SEED_KEY`). A decision's sample depends on its seed and
            its logits alone, not on the rest of the batch or the device; None draws from torch's global generator.

    Raises:
        ValueError: if the temperature is negative or not finite, the logits have too few dimensions, or the seeds are
            not one per decision.

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
        self,
        logits: Tensor,
        temperature: float = 1.0,
        event_dims: int = 0,
        validate_args: bool | None = None,
        *,
        seed: Tensor | None = None,
    ) -> None:
        check_temperature(temperature)
        if not 0 <= event_dims < logits.ndim:
            raise UserError(
                f"event_dims must be from 0 to {logits.ndim - 1} for logits {list(logits.shape)}, got {event_dims}."
            )
        self.logits = logits.float()
        self.temperature = temperature
        self.event_dims = event_dims
        if seed is not None and (seed.dtype != torch.int64 or seed.shape != (*logits.shape[: seed.ndim - 1], 1)):
            raise UserError(
                f"seed must be int64 [*B, 1], one per decision of logits {list(logits.shape)}; got {seed.dtype} "
                f"{list(seed.shape)}."
            )
        self.seed = seed
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
    def mean(self) -> Tensor:
        """The most likely bins: bins have no average, and this is what TorchRL acts with under ``MEAN``."""
        return self.mode

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
            if self.seed is None:
                uniform = torch.rand((*tokens, shape.numel()), device=self.logits.device)
            else:
                per_decision = tokens[self.seed.ndim - 1 :].numel() * shape.numel()
                uniform = seeded_uniforms(self.seed, per_decision).view(*tokens, shape.numel())
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
        """Return the same distribution, broadcast to ``batch_shape``."""
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape + self.logits.shape[-1:])
        seed = self.seed
        if seed is not None:
            new_dims = logits.ndim - self.logits.ndim
            seed = seed.expand(*logits.shape[: new_dims + seed.ndim - 1], 1)
        return TokenCategorical(logits, self.temperature, self.event_dims, self._validate_args, seed=seed)

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


def mix_seed(seed: Tensor, number: Tensor) -> Tensor:
    """Derive the seeds of a numbered sequence from one seed: the outputs of SplitMix64.

    Integer arithmetic only, so every device gives the same bits, and nothing is read back from it.

    Args:
        seed: int64.
        number: int64, from 1, of the outputs wanted; broadcasts with the seed.

    Returns:
        int64, uniform over all values.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014),
    https://doi.org/10.1145/2660193.2660195.

    Examples:
        >>> mix_seed(torch.tensor(1234567), torch.tensor([1, 2]))
        tensor([6457827717110365317, 3203168211198807973])
    """
    z = seed + number * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def seeded_uniforms(seed: Tensor, count: int) -> Tensor:
    """Draw uniform numbers from each seed.

    Args:
        seed: int64 ``[*B, 1]``.
        count: numbers per seed.

    Returns:
        Multiples of 2**-24 in [0, 1), float32 ``[*B, count]``.

    Examples:
        >>> seeded_uniforms(torch.tensor([[1234567], [3]]), 2)
        tensor([[0.3501, 0.1736],
                [0.1135, 0.7003]])
    """
    numbers = mix_seed(seed, torch.arange(1, count + 1, device=seed.device))
    return _shift_right(numbers, 40).float() * 2.0**-24


def _signed(word: int) -> int:
    """Return the int64 of the same 64 bits."""
    return word - (1 << 64)


def _shift_right(word: Tensor, places: int) -> Tensor:
    """Shift 64 bits, zeros from the left, where int64 would repeat its sign."""
    return (word >> places) & ((1 << (64 - places)) - 1)


def check_temperature(value: float) -> None:
    """Raise a ValueError unless the value is a temperature."""
    if not math.isfinite(value) or value < 0:
        raise UserError(f"temperature must be finite and >= 0 (0 is greedy), got {value}.")
