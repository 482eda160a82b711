"""Clipped policy optimisation for policies that emit a chunk of action tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules.distributions.utils import has_analytic_entropy
from torchrl.modules.value_norm import ValueNorm
from torchrl.objectives import ClipPPOLoss

from torchrl_vla.errors import UserError
from torchrl_vla.objectives.averaging import Aggregation, AveragedLoss, Averages, RatioLevel
from torchrl_vla.objectives.clip_arguments import (
    SwitchedCoefficients,
    check_choice,
    check_clip_bounds,
    check_coefficient,
    refuse_not_taken,
)
from torchrl_vla.objectives.clip_terms import (
    MAX_LOG_RATIO,
    clipped_gain,
    k3,
    ratio_figures,
    valid_log_prob,
    value_error,
    value_moments,
)
from torchrl_vla.objectives.masking import one_batch_size, standardize, zero_invalid


class AsymmetricClipPPOLoss(SwitchedCoefficients, AveragedLoss, ClipPPOLoss):
    r"""PPO's clipped objective with two clip ratios, for action tokens ``[*B, K, 7]``, masked throughout.

    With the ratio :math:`r = \pi_\theta / \pi_{old}` of a token, an action (7 tokens) or a whole chunk, it minimises

    .. math:: -\min\left(r A,\ \mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A\right)

    averaged over the valid ratios. It differs from :class:`~torchrl.objectives.ClipPPOLoss` in that the level of the
    ratio is a choice, the mask reaches every term and every diagnostic, micro-batches add up to their batch
    (:meth:`set_normalizer`), and a KL to a reference policy, dual clip and a reconstruction term are available.
    The networks are used as they are (TorchRL's ``functional=False``), so adapters and sharding stay in place.
    Log-ratios are limited to :math:`\pm 20` before they are exponentiated, so that gradients stay finite.

    An episode may end inside a chunk: of ``("next", "num_control_steps")`` ``[*B, 1]``, where the batch has it, only
    the first actions of each chunk count, those that were executed. The mask (:meth:`valid_tokens`) is the AND of
    that, of the entry ``mask`` and of TorchRL's own (``loss_mask_key``), each ``[*B]``, ``[*B, 1]``, ``[*B, K]`` or
    ``[*B, K, 7]``, under the names of :meth:`set_keys`. A masked entry has no gradient, whatever its log-probability,
    action, advantage, target or logits hold. Where the log-probabilities are one per decision, ``[*B]``, they are sums
    that no mask can take apart: an executed decision counts as a whole.

    Args:
        actor_network: the policy; its distribution has a log-probability per token, ``[*B, K, 7]``
            (``[*B]`` is enough for ``ratio_level="chunk"``).
        critic_network: reads what the actor wrote in the same pass, such as ``("vla_action", "hidden")``, and
            writes ``state_value`` ``[*B, 1]``. No critic is needed for group-relative advantages.

    Keyword Args:
        clip_ratio_low: :math:`\epsilon_{low}`, in (0, 1).
        clip_ratio_high: :math:`\epsilon_{high}`, positive.
        clip_epsilon: TorchRL's name for the two: a number for both, or the pair; in place of them.
        ratio_level: what one ratio spans: ``"token"``, ``"action"`` (one control step) or ``"chunk"`` (one decision).
        aggregation: ``"token"``: all valid ratios weigh the same, so that long episodes weigh more (DAPO,
            https://arxiv.org/abs/2503.14476). ``"trajectory"``: all trajectories weigh the same, and a token
            1 / (valid tokens of its trajectory), as in GRPO's formula (https://arxiv.org/abs/2402.03300) and in
            SimpleVLA-RL and RLinf; it reads ``trajectory_tokens``, which
            :class:`~torchrl_vla.objectives.GRPOAdvantage` writes. It concerns the losses of the policy: the critic's is
            a mean over decisions, and diagnostics are plain means.
        dual_clip: for a negative advantage, bound the objective by ``dual_clip * A``; above 1, 3 in the source
            (https://arxiv.org/abs/1912.09729). None leaves it out.
        entropy_coeff: weight of the mean token entropy, which is added to the objective.
        entropy_bonus: whether there is an entropy term; by default if ``entropy_coeff`` is positive.
        samples_mc_entropy: samples for the entropy of a distribution that has no closed form.
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
        clip_value: largest change of the value from the rollout's that lowers the loss; True takes ``clip_epsilon``
            where it is one number, None does not clip.
        separate_losses: stop the critic's gradient at its inputs, so that it does not reach the actor.
        log_explained_variance: report the critic's explained variance.
        normalize_advantage: give the valid advantages of each call mean 0 and deviation 1; not with micro-batches.
        normalize_advantage_exclude_dims: batch dimensions along which each index is normalised by itself.
        advantage_norm: divides the advantages by its scale, as in TorchRL.
        reduction: of the losses: "mean", "sum" over the valid entries, or "none", which keeps ``[*B, K, 7]`` (fewer
            dimensions where a ratio spans more; ``[*B]`` for the critic) with zeros where nothing counts. With
            ``aggregation="trajectory"`` the entries are those of the sum, weights included.
        device: where the coefficients are; by default where the parameters are.
        kwargs: ``actor`` and ``critic``, TorchRL's older names of the networks. Its other arguments are refused.

    The coefficients are buffers, and may be assigned between calls (``loss.kl_coeff = 0.1``). A term whose
    coefficient is 0 from the start is left out, its forward included, until its coefficient is raised.

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
        ValueError: if an argument is outside what it allows.
        TypeError: if an argument is TorchRL's, and not taken; the message says what to do instead.
    """

    @dataclass
    class _AcceptedKeys(ClipPPOLoss._AcceptedKeys):
        sample_log_prob: NestedKey | list[NestedKey] | None = ("vla_action", "log_probs")
        action: NestedKey | list[NestedKey] = ("vla_action", "tokens")
        mask: NestedKey = "mask"
        num_control_steps: NestedKey = ("next", "num_control_steps")
        trajectory_tokens: NestedKey = "trajectory_tokens"
        reference_log_prob: NestedKey = ("vla_action", "reference_log_probs")
        target_action: NestedKey = ("vla_action", "chunk")

    default_keys = _AcceptedKeys
    _in_keys: list[NestedKey] | None
    _out_keys: list[NestedKey] | None
    _schedulable_buffers = frozenset({"kl_coeff", "reconstruction_coeff"})

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential | None = None,
        critic_network: TensorDictModule | None = None,
        *,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.28,
        clip_epsilon: float | tuple[float, float] | None = None,
        ratio_level: RatioLevel = "token",
        aggregation: Aggregation = "token",
        dual_clip: float | None = None,
        entropy_coeff: float = 0.0,
        entropy_bonus: bool | None = None,
        samples_mc_entropy: int = 1,
        kl_coeff: float = 0.0,
        reference_context: Callable[[], AbstractContextManager[Any]] | None = None,
        reconstruction_coeff: float = 0.0,
        bin_centers: Tensor | None = None,
        critic_coeff: float | None = None,
        loss_critic_type: str = "l2",
        clip_value: bool | float | None = None,
        separate_losses: bool = False,
        log_explained_variance: bool = True,
        normalize_advantage: bool = False,
        normalize_advantage_exclude_dims: tuple[int, ...] = (),
        advantage_norm: ValueNorm | None = None,
        reduction: str | None = "mean",
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        actor_network = kwargs.pop("actor", None) or actor_network
        critic_network = kwargs.pop("critic", None) or critic_network
        refuse_not_taken(kwargs)
        if clip_epsilon is None:
            clip_epsilon = (clip_ratio_low, clip_ratio_high)
        elif (clip_ratio_low, clip_ratio_high) != (0.2, 0.28):
            raise UserError(
                f"clip_epsilon={clip_epsilon} and clip_ratio_low={clip_ratio_low}, clip_ratio_high={clip_ratio_high} "
                "say the same: give one of the two."
            )
        check_clip_bounds(*(clip_epsilon if isinstance(clip_epsilon, tuple | list) else (clip_epsilon, clip_epsilon)))
        check_choice("ratio_level", ratio_level, get_args(RatioLevel))
        check_choice("aggregation", aggregation, get_args(Aggregation))
        check_choice("loss_critic_type", loss_critic_type, ("l1", "l2", "smooth_l1"))
        if dual_clip is not None and not dual_clip > 1:
            raise UserError(f"dual_clip={dual_clip} must be above 1 (3 in the source), or None to leave it out.")
        if clip_value is not None and clip_value is not False and not clip_value > 0:
            raise UserError(f"clip_value={clip_value} must be positive, or None not to clip the value's change.")
        coefficients = {"entropy_coeff": entropy_coeff, "kl_coeff": kl_coeff}
        coefficients["reconstruction_coeff"] = reconstruction_coeff
        if critic_coeff is not None:
            coefficients["critic_coeff"] = critic_coeff
        for name, value in coefficients.items():
            check_coefficient(name, value)
        super().__init__(
            actor_network,
            critic_network,
            clip_epsilon=clip_epsilon,
            entropy_bonus=bool(entropy_bonus),
            entropy_coeff=0.0,
            samples_mc_entropy=samples_mc_entropy,
            critic_coeff=critic_coeff,
            loss_critic_type=loss_critic_type,
            clip_value=clip_value,
            separate_losses=separate_losses,
            log_explained_variance=log_explained_variance,
            normalize_advantage=normalize_advantage,
            normalize_advantage_exclude_dims=normalize_advantage_exclude_dims,
            advantage_norm=advantage_norm,
            reduction=reduction,
            device=device,
            functional=False,
        )
        self.ratio_level = ratio_level
        self.aggregation = aggregation
        self.dual_clip = dual_clip
        self.reference_context = reference_context
        self._entropy_refused = entropy_bonus is False
        self._has_kl = self._has_reconstruction = False
        self.register_buffer("bin_centers", bin_centers, persistent=False)
        for name in ("kl_coeff", "reconstruction_coeff"):
            self.register_coeff_buffer(name, 0.0, device=self.entropy_coeff.device)
        self._make_switches_live()
        for name in ("entropy_coeff", "kl_coeff", "reconstruction_coeff"):
            setattr(self, name, coefficients[name])

    def _lacking(self, coefficient: str) -> str | None:
        if coefficient == "entropy_coeff" and self._entropy_refused:
            return "entropy_bonus=True"
        if coefficient == "reconstruction_coeff" and self.bin_centers is None:
            return "bin_centers, the action value of each token: the tokenizer's"
        if coefficient == "critic_coeff" and self.critic_network is None:
            return "a critic_network"
        return None

    def _set_in_keys(self) -> None:
        self._in_keys = None  # what a call reads depends on its terms, too

    @ClipPPOLoss.in_keys.getter
    def in_keys(self) -> list[NestedKey]:
        """Return what a call reads, where the batch has it."""
        if self._in_keys is not None:
            return self._in_keys
        keys, critic = self.tensor_keys, self.critic_network
        names: list[Any] = [*self.actor_network.in_keys, keys.action, keys.sample_log_prob, keys.advantage]
        names += [keys.mask, keys.num_control_steps]
        names += [keys.trajectory_tokens] * (self.aggregation == "trajectory")
        names += [keys.reference_log_prob] * self._has_kl + [keys.target_action] * self._has_reconstruction
        if critic is not None:
            # The critic's inputs, the targets, and what computes them here where they are missing.
            given = [key for key in critic.in_keys if key not in self.actor_network.out_keys]
            names += [*given, keys.value_target, keys.value]
            names += map(_next, (*given, keys.value, keys.reward, keys.done, keys.terminated))
        return list(dict.fromkeys(names))

    @ClipPPOLoss.out_keys.getter
    def out_keys(self) -> list[NestedKey]:
        """Return the losses, ``loss_*``, to be summed and differentiated, and the detached diagnostics."""
        if self._out_keys is not None:
            return self._out_keys
        keys = ["loss_objective", "clip_fraction", "kl_approx", "ESS", "max_ratio", "mean_ratio", "num_ratios"]
        keys += ["entropy"] + ["loss_entropy"] * self.entropy_bonus
        keys += ["loss_kl", "kl_reference"] * self._has_kl
        keys += ["loss_reconstruction"] * self._has_reconstruction
        keys += ["loss_critic", "value_loss"] * self._has_critic
        keys += ["explained_variance"] * (self._has_critic and self.log_explained_variance)
        return keys + ["value_clip_fraction"] * (self._has_critic and self.clip_value is not None)

    @torch.no_grad()
    def reference_log_prob(self, tensordict: TensorDictBase) -> Tensor:
        """Compute the log-probabilities of the actions under the reference policy, ``[*B, K, 7]``.

        Store them as ``reference_log_prob`` to spare their forward where a batch is used for several epochs.

        Raises:
            ValueError: if the loss has no ``reference_context``.
        """
        if self.reference_context is None:
            raise UserError(
                f"kl_coeff={self.kl_coeff.item()} needs a reference: pass reference_context (a function that returns "
                "a context in which the actor is the reference, such as the adapters' disable_adapter), or store "
                f"its log-probabilities as {self.tensor_keys.reference_log_prob!r}."
            )
        tensordict = tensordict.clone(False)
        with self.reference_context():
            log_prob, _ = self._log_prob(tensordict, self.valid_tokens(tensordict))
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
        batch = one_batch_size(tensordict)
        tensordict = batch.clone(False)
        averages = self._averages(tensordict)
        if self._normalizer is not None:
            averages.counts = self._normalizer
        advantage = self._advantage(tensordict, averages.decisions)
        log_prob, dist = self._log_prob(tensordict, averages.tokens)
        old_log_prob = tensordict.get(self.tensor_keys.sample_log_prob)
        if log_prob.shape != old_log_prob.shape:
            raise UserError(
                f"The actor's log-probabilities have shape {tuple(log_prob.shape)}, the stored ones "
                f"{tuple(old_log_prob.shape)}: collect with the distribution that the loss uses."
            )
        terms = self._objective(zero_invalid(log_prob - old_log_prob, averages.tokens), advantage, averages)
        terms |= self._entropy(dist, averages)
        if self._has_kl:
            terms |= self._kl(batch, log_prob, averages)
        if self._has_reconstruction:
            terms |= self._reconstruction(tensordict, dist, averages)
        if self._has_critic:
            terms |= self._critic(tensordict, averages)
        return TensorDict({key: value if key.startswith("loss_") else value.detach() for key, value in terms.items()})

    def _advantage(self, tensordict: TensorDictBase, decisions: Tensor) -> Tensor:
        computed_here = tensordict.get(self.tensor_keys.advantage, None) is None
        if computed_here and self.critic_network is None:
            raise KeyError(f"The batch has no {self.tensor_keys.advantage!r}: compute it first (GRPOAdvantage, GAE).")
        if computed_here:
            self.value_estimator(tensordict)
        advantage: Tensor = tensordict.get(self.tensor_keys.advantage)
        if advantage.shape != (*tensordict.shape, 1):
            raise UserError(
                f"advantage has shape {tuple(advantage.shape)}, expected one per decision, {(*tensordict.shape, 1)}."
            )
        if self.advantage_norm is not None:
            advantage = self._scale_advantage(advantage, tensordict, update=computed_here)
        elif self.normalize_advantage and advantage.numel() > 1:
            advantage = standardize(advantage, decisions, self.normalize_advantage_exclude_dims)
        return advantage

    def _log_prob(self, tensordict: TensorDictBase, valid: Tensor) -> tuple[Tensor, Distribution]:
        return valid_log_prob(self.actor_network, tensordict, tensordict.get(self.tensor_keys.action), valid)

    def _objective(self, log_ratio: Tensor, advantage: Tensor, averages: Averages) -> dict[str, Tensor]:
        log_ratio, ratios = averages.per_ratio(log_ratio).sum(-1), averages.ratios
        advantage = advantage.reshape(*advantage.shape[:-1], *(1,) * (ratios.ndim - averages.batch_dims))
        limited = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        gain = clipped_gain(limited, advantage.expand(ratios.shape), self._clip_bounds, self.dual_clip)
        figures = ratio_figures(log_ratio, ratios, self._clip_bounds, averages.counts["ratios"])
        return {"loss_objective": averages.reduce_ratios(-gain), **figures}

    def _entropy(self, dist: Distribution, averages: Averages) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.entropy_bonus and torch.is_grad_enabled()):
            if has_analytic_entropy(dist):
                entropy = dist.entropy()
            else:
                entropy = self._get_entropy(dist, averages.tokens.shape).squeeze(-1)
        terms = {"entropy": averages.mean_of_tokens(entropy)}
        if self.entropy_bonus:
            terms["loss_entropy"] = -self.entropy_coeff * averages.reduce_tokens(entropy)
        return terms

    def _kl(self, tensordict: TensorDictBase, log_prob: Tensor, averages: Averages) -> dict[str, Tensor]:
        reference = tensordict.get(self.tensor_keys.reference_log_prob, None)
        if reference is None:
            reference = self.reference_log_prob(tensordict)
        kl = k3(zero_invalid(reference - log_prob, averages.tokens))
        return {"loss_kl": self.kl_coeff * averages.reduce_tokens(kl), "kl_reference": averages.mean_of_tokens(kl)}

    def _reconstruction(self, tensordict: TensorDictBase, dist: Distribution, averages: Averages) -> dict[str, Tensor]:
        # The expectation, unlike the decoded sample, has a gradient.
        categorical: Any = getattr(dist, "base_dist", dist)
        expected = (categorical.probs * self.bin_centers).sum(-1)
        target = tensordict.get(self.tensor_keys.target_action, None)
        if target is None:
            taken = zero_invalid(tensordict.get(self.tensor_keys.action), averages.tokens)
            target = self.bin_centers.expand_as(categorical.probs).gather(-1, taken.unsqueeze(-1)).squeeze(-1)
        error = zero_invalid(expected - target, averages.tokens).square()
        return {"loss_reconstruction": self.reconstruction_coeff * averages.reduce_tokens(error)}

    def _critic(self, tensordict: TensorDictBase, averages: Averages) -> dict[str, Tensor]:
        valid = averages.decisions
        target = tensordict.get(self.tensor_keys.value_target, None)
        if target is None:
            raise KeyError(f"The critic needs {self.tensor_keys.value_target!r}, the target return that GAE writes.")
        target = zero_invalid(target, valid)
        old_value = tensordict.get(self.tensor_keys.value, None)
        if self.clip_value is not None:
            if old_value is None:
                raise KeyError(f"clip_value needs the rollout's {self.tensor_keys.value!r} in the batch.")
            old_value = zero_invalid(old_value, valid)
        value = self.critic_network(tensordict.detach() if self.separate_losses else tensordict)
        value = zero_invalid(value.get(self.tensor_keys.value), valid)
        error, clipped = value_error(value, target, old_value, self.clip_value, self.loss_critic_type)
        terms = {"loss_critic": self.critic_coeff * averages.reduce_decisions(error)}
        terms["value_loss"] = averages.mean_of_decisions(error)
        if clipped is not None:
            terms["value_clip_fraction"] = averages.mean_of_decisions(clipped)
        if self.log_explained_variance:
            moments = value_moments(value, target, valid)
            kept = moments if self._normalizer is not None else ("explained_variance",)
            terms |= {name: moments[name] for name in kept}
        return terms


def _next(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)
