"""Losses of supervised fine-tuning: cross-entropy of action tokens, and L1 distance of actions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from torchrl_vla.errors import UserError
from torchrl_vla.objectives.masking import masked_mean, one_batch_size, valid_entries


class TokenCrossEntropyLoss(LossModule):
    """Cross-entropy between a policy's token logits and demonstrated action tokens.

    Args:
        network: writes logits ``[*B, K, D, V]``.

    Keyword Args:
        target_sigma: 0 takes the demonstrated bin as the whole target; else neighbouring bins share it, weighted by a
            normal density of this standard deviation in bins, so that a near miss costs less than a far one.
        bin_centers: the value of each token, ``[V]``; with it the distance of the most likely actions is reported.

    Examples:
        >>> network = TensorDictModule(lambda x: x, in_keys=["logits"], out_keys=[("vla_action", "logits")])
        >>> loss = TokenCrossEntropyLoss(network)
        >>> batch = TensorDict({"logits": torch.zeros(4, 8, 7, 256),
        ...                     ("vla_action", "tokens"): torch.zeros(4, 8, 7, dtype=torch.int64)}, [4])
        >>> loss(batch)["loss_tokens"]
        tensor(5.5452)

    Raises:
        ValueError: if ``target_sigma`` is negative.
    """

    @dataclass
    class _AcceptedKeys(LossModule._AcceptedKeys):
        logits: NestedKey = ("vla_action", "logits")
        tokens: NestedKey = ("vla_action", "tokens")
        mask: NestedKey = "mask"
        num_control_steps: NestedKey = ("next", "num_control_steps")

    default_keys = _AcceptedKeys
    out_keys = ["loss_tokens", "accuracy", "entropy", "l1"]

    def __init__(
        self, network: TensorDictModule, *, target_sigma: float = 0.0, bin_centers: Tensor | None = None
    ) -> None:
        if target_sigma < 0:
            raise UserError(f"target_sigma must not be negative (0 turns soft targets off), got {target_sigma}.")
        super().__init__()
        self.network = network
        self.target_sigma = target_sigma
        self.in_keys = [*network.in_keys, self.tensor_keys.tokens]
        self.register_buffer("bin_centers", bin_centers, persistent=False)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss and how good the most likely tokens are.

        Args:
            tensordict: what the network reads, tokens int64 ``[*B, K, D]`` and, optionally, ``mask`` bool ``[*B, K]``
                of the control steps that count and, of a policy's own episodes, ``("next", "num_control_steps")``
                ``[*B, 1]``, which leaves out actions that were never executed.

        Returns:
            ``loss_tokens``, and detached: ``accuracy`` (share of tokens whose most likely bin is the demonstrated
            one), ``entropy`` in nats and, with ``bin_centers``, ``l1`` in their unit.
        """
        tokens = tensordict.get(self.tensor_keys.tokens)
        valid = _valid(self, tensordict, tokens)
        logits = self.network(one_batch_size(tensordict)).get(self.tensor_keys.logits)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        terms = {"loss_tokens": masked_mean(self._cross_entropy(log_probs, tokens), valid)}
        with torch.no_grad():
            best = log_probs.argmax(dim=-1)
            terms["accuracy"] = masked_mean((best == tokens).float(), valid)
            terms["entropy"] = masked_mean(-(log_probs.exp() * log_probs).sum(dim=-1), valid)
            if self.bin_centers is not None:
                distance = (self.bin_centers[best] - self.bin_centers[tokens]).abs().float()
                terms["l1"] = masked_mean(distance, valid)
        return TensorDict(terms)

    def _cross_entropy(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        if not self.target_sigma:
            return -log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        distance = torch.arange(log_probs.shape[-1], device=tokens.device) - tokens.unsqueeze(-1)
        targets = torch.softmax(-0.5 * (distance / self.target_sigma).square(), dim=-1)
        return -(targets * log_probs).sum(dim=-1)


class ActionL1Loss(LossModule):
    """Mean absolute distance between predicted and demonstrated actions, both normalised: OpenVLA-OFT's objective.

    Args:
        network: writes ``("vla_action", "prediction")`` ``[*B, K, D]``.

    Source: OpenVLA-OFT (arXiv:2502.19645).

    Examples:
        >>> network = TensorDictModule(lambda x: x, in_keys=["x"], out_keys=[("vla_action", "prediction")])
        >>> batch = TensorDict({"x": torch.zeros(4, 8, 7), ("vla_action", "chunk"): torch.full((4, 8, 7), 0.5)}, [4])
        >>> ActionL1Loss(network)(batch)["loss_l1"]
        tensor(0.5000)
    """

    @dataclass
    class _AcceptedKeys(LossModule._AcceptedKeys):
        prediction: NestedKey = ("vla_action", "prediction")
        target: NestedKey = ("vla_action", "chunk")
        mask: NestedKey = "mask"
        num_control_steps: NestedKey = ("next", "num_control_steps")

    default_keys = _AcceptedKeys
    out_keys = ["loss_l1", "l1"]

    def __init__(self, network: TensorDictModule) -> None:
        super().__init__()
        self.network = network
        self.in_keys = [*network.in_keys, self.tensor_keys.target]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss.

        Args:
            tensordict: what the network reads, normalised actions ``[*B, K, D]`` and, optionally, ``mask`` bool
                ``[*B, K]`` of the control steps that count and, of a policy's own episodes, ``("next",
                "num_control_steps")`` ``[*B, 1]``, which leaves out actions that were never executed.
        """
        target = tensordict.get(self.tensor_keys.target)
        valid = _valid(self, tensordict, target)
        prediction = self.network(one_batch_size(tensordict)).get(self.tensor_keys.prediction)
        loss = masked_mean((prediction.float() - target).abs(), valid)
        return TensorDict({"loss_l1": loss, "l1": loss.detach()})


def _valid(loss: LossModule, tensordict: TensorDictBase, like: Tensor) -> Tensor:
    keys = loss.tensor_keys
    masks = (keys.mask, *loss._loss_mask_keys())
    return valid_entries(
        tensordict, like.shape, masks=masks, num_control_steps=keys.num_control_steps, device=like.device
    )
