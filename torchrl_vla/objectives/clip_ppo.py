"""Clipped policy optimisation for policies that emit a chunk of action tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives import ClipPPOLoss, distance_loss

from torchrl_vla.objectives.combining import explained_variance
from torchrl_vla.objectives.masking import effective_sample_size, expand_mask, masked_mean, zero_invalid

RatioLevel = Literal["token", "action", "chunk"]


def _per_decision(per_token: Tensor, batch_dims: int) -> Tensor:
    """Gather the tokens of each decision in one last dimension."""
    return per_token.unsqueeze(-1).flatten(batch_dims)


class AsymmetricClipPPOLoss(ClipPPOLoss):
    r"""PPO's clipped objective with two clip ratios, for action tokens ``[*B, K, 7]``, masked throughout.

    With the ratio :math:`r = \pi_\theta / \pi_{old}` of a token, an action (7 tokens) or a whole chunk, it minimises

    .. math:: -\min\left(r A,\ \mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A\right)

    averaged over the valid ratios. It differs from :class:`~torchrl.objectives.ClipPPOLoss` in that the level of the
    ratio is a choice, the mask reaches every term and every diagnostic, micro-batches add up to their batch
    (:meth:`set_normalizer`), and a KL to a reference policy, dual clip and a reconstruction term are available.
    The networks are used as they are (TorchRL's ``functional=False``), so adapters and sharding stay in place.

    The mask is the AND of the entries ``mask`` (see :meth:`set_keys`) and TorchRL's own (``loss_mask_key``), each
    ``[*B]``, ``[*B, 1]``, ``[*B, K]`` or ``[*B, K, 7]``; without one, everything counts. A masked entry has no
    gradient, whatever its log-probability, action, advantage, target or logits hold.

    Args:
        actor_network: the policy; its distribution has a log-probability per token, ``[*B, K, 7]``
            (``[*B]`` is enough for ``ratio_level="chunk"``).
        critic_network: reads what the actor wrote in the same pass, such as ``("vla_action", "hidden")``, and
            writes ``state_value`` ``[*B, 1]``. No critic is needed for group-relative advantages.

    Keyword Args:
        clip_ratio_low: :math:`\epsilon_{low}`, in (0, 1).
        clip_ratio_high: :math:`\epsilon_{high}`, positive.
        ratio_level: what one ratio spans: ``"token"``, ``"action"`` (one control step) or ``"chunk"`` (one decision).
        dual_clip: for a negative advantage, bound the objective by ``dual_clip * A``; above 1, 3 in the source
            (https://arxiv.org/abs/1912.09729). None leaves it out.
        entropy_coeff: weight of the mean token entropy, which is added to the objective.
        kl_coeff: weight of the mean token KL to the reference, by the k3 estimator
            (http://joschu.net/blog/kl-approx.html).
        reference_context: makes a context in which the actor is the reference, such as a PEFT model's
            ``disable_adapter``; used where the data have no ``reference_log_prob``.
        reconstruction_coeff: weight of the mean squared error between the expected action (the bin centres under
            the token distribution) and ``target_action`` ``[*B, K, 7]``, in the centres' units; where the data have
            no such entry, the action that was taken.
        bin_centers: the action value of each token, ``[V]``, or ``[7, V]``.
        critic_coeff: weight of the critic's loss; 1 if there is a critic.
        loss_critic_type: "l1", "l2" or "smooth_l1".
        clip_value: largest change of the value from the rollout's that lowers the loss; None does not clip.
        separate_losses: stop the critic's gradient at its inputs, so that it does not reach the actor.

    Examples:
        >>> from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
        >>> logits = TensorDictModule(torch.nn.LazyLinear(2 * 7 * 4), in_keys=["state"], out_keys=["logits"])
        >>> shape = TensorDictModule(lambda x: x.unflatten(-1, (2, 7, 4)), in_keys=["logits"], out_keys=["logits"])
        >>> sample = ProbabilisticTensorDictModule(
        ...     in_keys=["logits"], out_keys=[("vla_action", "tokens")], return_log_prob=True,
        ...     log_prob_key=("vla_action", "log_probs"), distribution_class=torch.distributions.Categorical)
        >>> actor = ProbabilisticTensorDictSequential(logits, shape, sample)
        >>> with torch.no_grad():
        ...     data = actor(TensorDict({"state": torch.randn(5, 3)}, [5]))
        >>> terms = AsymmetricClipPPOLoss(actor)(data.set("advantage", torch.ones(5, 1)))
        >>> terms["loss_objective"].item(), terms["mean_ratio"].item()
        (-1.0, 1.0)

    Raises:
        ValueError: if a coefficient or the ratio level is outside what it allows.
    """

    @dataclass
    class _AcceptedKeys(ClipPPOLoss._AcceptedKeys):
        sample_log_prob: NestedKey | list[NestedKey] | None = ("vla_action", "log_probs")
        action: NestedKey | list[NestedKey] = ("vla_action", "tokens")
        mask: NestedKey = "mask"
        reference_log_prob: NestedKey = ("vla_action", "reference_log_probs")
        target_action: NestedKey = ("vla_action", "chunk")

    default_keys = _AcceptedKeys
    _out_keys: list[NestedKey] | None
    _schedulable_buffers = frozenset({"kl_coeff", "reconstruction_coeff"})

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule | None = None,
        *,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.28,
        ratio_level: RatioLevel = "token",
        dual_clip: float | None = None,
        entropy_coeff: float = 0.0,
        kl_coeff: float = 0.0,
        reference_context: Callable[[], AbstractContextManager[Any]] | None = None,
        reconstruction_coeff: float = 0.0,
        bin_centers: Tensor | None = None,
        critic_coeff: float | None = None,
        loss_critic_type: str = "smooth_l1",
        clip_value: float | None = None,
        separate_losses: bool = False,
    ) -> None:
        if not 0 < clip_ratio_low < 1:
            raise ValueError(f"clip_ratio_low={clip_ratio_low} must lie in (0, 1): the lower bound is 1 - it.")
        if not clip_ratio_high > 0:
            raise ValueError(f"clip_ratio_high={clip_ratio_high} must be positive: the upper bound is 1 + it.")
        if ratio_level not in get_args(RatioLevel):
            raise ValueError(f"ratio_level={ratio_level!r} is unknown: choose one of {get_args(RatioLevel)}.")
        if dual_clip is not None and not dual_clip > 1:
            raise ValueError(f"dual_clip={dual_clip} must be above 1 (3 in the source), or None to leave it out.")
        for name, coeff in (("kl_coeff", kl_coeff), ("reconstruction_coeff", reconstruction_coeff)):
            if coeff < 0:
                raise ValueError(f"{name}={coeff} must not be negative: 0 leaves the term out.")
        if reconstruction_coeff and bin_centers is None:
            raise ValueError(
                "reconstruction_coeff needs bin_centers, the action value of each token: pass the tokenizer's."
            )
        super().__init__(
            actor_network,
            critic_network,
            clip_epsilon=(clip_ratio_low, clip_ratio_high),
            entropy_bonus=bool(entropy_coeff),
            entropy_coeff=entropy_coeff,
            critic_coeff=critic_coeff,
            loss_critic_type=loss_critic_type,
            clip_value=clip_value,
            separate_losses=separate_losses,
            functional=False,
        )
        self.ratio_level = ratio_level
        self.dual_clip = dual_clip
        self.reference_context = reference_context
        device = self.entropy_coeff.device
        self.register_coeff_buffer("kl_coeff", kl_coeff, device=device)
        self.register_coeff_buffer("reconstruction_coeff", reconstruction_coeff, device=device)
        self.register_buffer("bin_centers", bin_centers, persistent=False)
        self._has_kl = kl_coeff > 0
        self._has_reconstruction = reconstruction_coeff > 0
        self._normalizer: TensorDictBase | None = None

    @ClipPPOLoss.out_keys.getter
    def out_keys(self) -> list[NestedKey]:
        """The losses, ``loss_*``, to be summed and differentiated, and the detached diagnostics."""
        if self._out_keys is None:
            keys = ["loss_objective", "clip_fraction", "kl_approx", "ESS", "max_ratio", "mean_ratio", "num_ratios"]
            keys += ["entropy"] + ["loss_entropy"] * self.entropy_bonus
            keys += ["loss_kl", "kl_reference"] * self._has_kl
            keys += ["loss_reconstruction"] * self._has_reconstruction
            keys += ["loss_critic", "explained_variance"] * self._has_critic
            keys += ["value_clip_fraction"] * (self._has_critic and self.clip_value is not None)
            self._out_keys = keys
        return self._out_keys

    def count_valid(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Count what the terms of the loss average over, without a forward.

        Args:
            tensordict: a batch with log-probabilities ``[*B, K, 7]`` and, if any, masks.

        Returns:
            The number of valid ``"ratios"``, ``"tokens"`` and ``"decisions"``: integer tensors, which processes that
            share a batch sum (and divide by their number where gradients are averaged).
        """
        log_prob = tensordict.get(self.tensor_keys.sample_log_prob)
        valid = self._valid_tokens(tensordict, log_prob.shape)
        ratios = self._per_ratio(valid, tensordict.ndim).any(-1)
        counts = {"ratios": ratios, "tokens": valid, "decisions": _per_decision(valid, tensordict.ndim).any(-1)}
        return TensorDict({key: value.sum() for key, value in counts.items()})

    def set_normalizer(self, counts: TensorDictBase | None) -> None:
        """Divide the sums of the following calls by the counts of a larger batch, so that they add up to its loss.

        :func:`~torchrl_vla.objectives.combining.combine` makes one of the calls' diagnostics; for it, a critic's calls
        return more entries.

        Args:
            counts: what :meth:`count_valid` says of the whole batch; None returns to each call's own mean.

        Examples:
            >>> loss.set_normalizer(loss.count_valid(batch))  # doctest: +SKIP
            >>> for micro_batch in batch.split(8):  # doctest: +SKIP
            ...     sum_losses(loss(micro_batch)).backward()
        """
        self._normalizer = counts

    @torch.no_grad()
    def reference_log_prob(self, tensordict: TensorDictBase) -> Tensor:
        """Log-probabilities of the actions under the reference policy, ``[*B, K, 7]``.

        Store them as ``reference_log_prob`` to spare their forward where a batch is used for several epochs.

        Raises:
            ValueError: if the loss has no ``reference_context``.
        """
        if self.reference_context is None:
            raise ValueError(
                f"kl_coeff={self.kl_coeff.item()} needs a reference: pass reference_context (a function that returns "
                "a context in which the actor is the reference, such as the adapters' disable_adapter), or store "
                f"its log-probabilities as {self.tensor_keys.reference_log_prob!r}."
            )
        tensordict = tensordict.clone(False)
        valid = self._valid_tokens(tensordict, tensordict.get(self.tensor_keys.sample_log_prob).shape)
        with self.reference_context():
            log_prob, _ = self._log_prob(tensordict, valid)
        return log_prob

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses and diagnostics of a batch.

        Args:
            tensordict: decisions ``[*B]`` with what the actor reads, actions and log-probabilities ``[*B, K, 7]``,
                and ``advantage`` ``[*B, 1]``.

        Raises:
            KeyError: if the batch lacks an entry the terms need.
            ValueError: if the shapes of log-probabilities, mask or advantage do not fit each other or the ratio level.
        """
        batch, tensordict = tensordict, tensordict.clone(False)
        old_log_prob = tensordict.get(self.tensor_keys.sample_log_prob)
        valid = self._valid_tokens(tensordict, old_log_prob.shape)
        counts = self.count_valid(tensordict) if self._normalizer is None else self._normalizer
        advantage = self._advantage(tensordict)
        log_prob, dist = self._log_prob(tensordict, valid)
        if log_prob.shape != old_log_prob.shape:
            raise ValueError(
                f"The actor's log-probabilities have shape {tuple(log_prob.shape)}, the stored ones "
                f"{tuple(old_log_prob.shape)}: collect with the distribution that the loss uses."
            )
        terms = self._objective(zero_invalid(log_prob - old_log_prob, valid), valid, advantage, counts)
        terms |= self._entropy(dist, valid, counts)
        if self._has_kl:
            terms |= self._kl(batch, log_prob, valid, counts)
        if self._has_reconstruction:
            terms |= self._reconstruction(tensordict, dist, valid, counts)
        if self._has_critic:
            terms |= self._critic(tensordict, _per_decision(valid, tensordict.ndim).any(-1, keepdim=True), counts)
        return TensorDict({key: value if key.startswith("loss_") else value.detach() for key, value in terms.items()})

    def _valid_tokens(self, tensordict: TensorDictBase, shape: torch.Size) -> Tensor:
        valid = torch.ones((), dtype=torch.bool, device=tensordict.get(self.tensor_keys.sample_log_prob).device)
        valid = valid.expand(shape)
        for key in {self.tensor_keys.mask, *self._loss_mask_keys()}:
            mask = tensordict.get(key, None)
            if mask is not None:
                valid = valid & expand_mask(mask, shape)
        return valid

    def _per_ratio(self, per_token: Tensor, batch_dims: int) -> Tensor:
        """Gather the tokens of each ratio in a new last dimension."""
        if self.ratio_level == "token":
            return per_token.unsqueeze(-1)
        if self.ratio_level == "chunk":
            return _per_decision(per_token, batch_dims)
        if per_token.ndim != batch_dims + 2:
            raise ValueError(
                f"ratio_level='action' needs log-probabilities [*B, K, 7], got {tuple(per_token.shape)} for a batch "
                f"with {batch_dims} dimension(s): use 'token' or 'chunk', or a policy with one per token."
            )
        return per_token

    def _advantage(self, tensordict: TensorDictBase) -> Tensor:
        advantage = tensordict.get(self.tensor_keys.advantage, None)
        if advantage is None and self.critic_network is None:
            raise KeyError(f"The batch has no {self.tensor_keys.advantage!r}: compute it first (GRPOAdvantage, GAE).")
        if advantage is None:
            self.value_estimator(tensordict)
            advantage = tensordict.get(self.tensor_keys.advantage)
        if advantage.shape != (*tensordict.shape, 1):
            raise ValueError(
                f"advantage has shape {tuple(advantage.shape)}, expected one per decision, {(*tensordict.shape, 1)}."
            )
        return advantage

    def _log_prob(self, tensordict: TensorDictBase, valid: Tensor) -> tuple[Tensor, Distribution]:
        """Log-probabilities of the stored actions, invalid entries of actions and parameters replaced by zeros."""
        actor = self.actor_network
        if isinstance(actor, ProbabilisticTensorDictSequential) and not actor.return_composite:
            parameters = actor.get_dist_params(tensordict)
            for key in actor.dist_params_keys:
                value = parameters.get(key)
                if value.shape[: valid.ndim] == valid.shape:
                    parameters.set(key, zero_invalid(value, expand_mask(valid, value.shape)))
            dist = actor.build_dist_from_params(parameters)
        else:
            dist = actor.get_dist(tensordict)
        action = tensordict.get(self.tensor_keys.action)
        if action.shape[: valid.ndim] == valid.shape:
            action = zero_invalid(action, expand_mask(valid, action.shape))
        return dist.log_prob(action), dist

    def _objective(
        self, log_ratio: Tensor, valid: Tensor, advantage: Tensor, counts: TensorDictBase
    ) -> dict[str, Tensor]:
        batch_dims = advantage.ndim - 1
        log_ratio = self._per_ratio(log_ratio, batch_dims).sum(-1)
        valid = self._per_ratio(valid, batch_dims).any(-1)
        advantage = advantage.reshape(*advantage.shape[:-1], *(1,) * (valid.ndim - batch_dims)).expand(valid.shape)
        clipped = log_ratio.clamp(*self._clip_bounds)
        gain = torch.minimum(log_ratio.exp() * advantage, clipped.exp() * advantage)
        if self.dual_clip is not None:
            gain = torch.where(advantage < 0, torch.maximum(gain, self.dual_clip * advantage), gain)
        with torch.no_grad():
            ratio = zero_invalid(log_ratio.exp(), valid)
            diagnostics = {
                "clip_fraction": masked_mean((clipped != log_ratio).to(log_ratio.dtype), valid, counts["ratios"]),
                "kl_approx": masked_mean(-log_ratio, valid, counts["ratios"]),
                "ESS": effective_sample_size(log_ratio, valid),
                "max_ratio": ratio.amax(),
                "mean_ratio": masked_mean(ratio, valid, counts["ratios"]),
                "num_ratios": valid.sum(),
            }
        return {"loss_objective": -masked_mean(gain, valid, counts["ratios"]), **diagnostics}

    def _entropy(self, dist: Distribution, valid: Tensor, counts: TensorDictBase) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.entropy_bonus and torch.is_grad_enabled()):
            entropy = zero_invalid(dist.entropy(), valid)
        terms = {"entropy": masked_mean(entropy, valid, counts["tokens"])}
        if self.entropy_bonus:
            terms["loss_entropy"] = -self.entropy_coeff * terms["entropy"]
        return terms

    def _kl(
        self, tensordict: TensorDictBase, log_prob: Tensor, valid: Tensor, counts: TensorDictBase
    ) -> dict[str, Tensor]:
        reference = tensordict.get(self.tensor_keys.reference_log_prob, None)
        if reference is None:
            reference = self.reference_log_prob(tensordict)
        log_ratio = zero_invalid(reference - log_prob, valid)
        kl = masked_mean(log_ratio.exp() - log_ratio - 1, valid, counts["tokens"])
        return {"loss_kl": self.kl_coeff * kl, "kl_reference": kl}

    def _reconstruction(
        self, tensordict: TensorDictBase, dist: Distribution, valid: Tensor, counts: TensorDictBase
    ) -> dict[str, Tensor]:
        # The expectation, unlike the decoded sample, has a gradient.
        categorical: Any = getattr(dist, "base_dist", dist)
        expected = (categorical.probs * self.bin_centers).sum(-1)
        target = tensordict.get(self.tensor_keys.target_action, None)
        if target is None:
            taken = zero_invalid(tensordict.get(self.tensor_keys.action), valid)
            target = self.bin_centers.expand_as(categorical.probs).gather(-1, taken.unsqueeze(-1)).squeeze(-1)
        error = zero_invalid(expected - target, valid).square()
        return {"loss_reconstruction": self.reconstruction_coeff * masked_mean(error, valid, counts["tokens"])}

    def _critic(self, tensordict: TensorDictBase, valid: Tensor, counts: TensorDictBase) -> dict[str, Tensor]:
        target = tensordict.get(self.tensor_keys.value_target, None)
        if target is None:
            raise KeyError(f"The critic needs {self.tensor_keys.value_target!r}, the target return that GAE writes.")
        target = zero_invalid(target, valid)
        old_value = tensordict.get(self.tensor_keys.value, None)
        value = self.critic_network(tensordict.detach() if self.separate_losses else tensordict)
        value = zero_invalid(value.get(self.tensor_keys.value), valid)
        loss = distance_loss(target, value, loss_function=self.loss_critic_type)
        terms = {}
        if self.clip_value is not None:
            if old_value is None:
                raise KeyError(f"clip_value needs the rollout's {self.tensor_keys.value!r} in the batch.")
            change = value - zero_invalid(old_value, valid)
            clipped = change.clamp(-self.clip_value, self.clip_value)
            bounded = distance_loss(target, value - change + clipped, loss_function=self.loss_critic_type)
            loss = torch.maximum(loss, bounded)
            clips = (change != clipped).to(value.dtype)
            terms["value_clip_fraction"] = masked_mean(clips, valid, counts["decisions"])
        with torch.no_grad():
            moments = {"num_values": valid.sum()}
            for name, values in {"target": target, "residual": target - value}.items():
                mean = masked_mean(values, valid)
                moments[f"{name}_mean"] = mean
                moments[f"{name}_variance"] = masked_mean((values - mean).square(), valid)
            terms["explained_variance"] = explained_variance(moments)
            if self._normalizer is not None:
                terms |= moments
        return {"loss_critic": self.critic_coeff * masked_mean(loss, valid, counts["decisions"]), **terms}
