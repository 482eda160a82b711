"""A policy with a value head, for advantages that need values."""

from __future__ import annotations

from typing import Self

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential

from torchrl_vla.checkpoints.policy import Policy
from torchrl_vla.modules import OpenVLAActor, ValueHead, make_value_operator

__all__ = ["Critic", "make_critic"]


class Critic:
    """A new value head on a policy's hidden state.

    Args:
        actor: the policy.
        hidden_size: of its network.

    Attributes:
        value_head: what learns.
        value_operator: reads ``("vla_action", "hidden")``, which the actor wrote in the same pass, and writes
            ``state_value``: the critic that the loss takes.
        rollout: the policy that also writes ``state_value``, in one pass of the network.
    """

    def __init__(self, actor: OpenVLAActor, hidden_size: int) -> None:
        self.value_head = ValueHead(hidden_size)
        self.value_operator: TensorDictModule = make_value_operator(actor, self.value_head)[-1]
        # The actor keeps its hidden state to itself; the value head reads it here, in the same pass.
        self.rollout = TensorDictSequential(actor.backbone, actor[-1], self.value_operator)
        self.rollout.select_out_keys(*actor.out_keys, *self.value_operator.out_keys)

    def to(self, device: torch.device) -> Self:
        """Move the value head."""
        self.value_head.to(device)
        return self


def make_critic(policy: Policy, device: torch.device) -> Critic:
    """Return a new value head for a policy.

    Args:
        policy: acts by tokens.
        device: where the policy is, and the head with it.
    """
    assert isinstance(policy.actor, OpenVLAActor)
    return Critic(policy.actor, policy.model.config.hidden_size).to(device)
