"""A policy over action tokens of a few hundred weights, and episodes for it: enough for whatever learns from tokens."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn

from torchrl_vla.modules.distributions import TokenCategorical

K, DIMS, BINS = 2, 3, 5


def make_actor() -> ProbabilisticTensorDictSequential:
    """The same weights each time."""
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(4, K * DIMS * BINS), nn.Unflatten(-1, (K, DIMS, BINS)))
    return ProbabilisticTensorDictSequential(
        TensorDictModule(logits, in_keys=[("observation", "state")], out_keys=[("vla_action", "logits")]),
        ProbabilisticTensorDictModule(
            in_keys={"logits": ("vla_action", "logits")},
            out_keys=[("vla_action", "tokens")],
            distribution_class=TokenCategorical,
            return_log_prob=True,
            log_prob_key=("vla_action", "log_probs"),
        ),
    )


def make_batch(actor: nn.Module, *, outcomes: tuple[tuple[int, ...], ...] = ((1, 0, 1), (0, 0, 1))) -> TensorDictBase:
    """Episodes of two decisions of two control steps; `outcomes` holds one success flag per episode, by group."""
    torch.manual_seed(1)
    episodes = [(group, success) for group, row in enumerate(outcomes) for success in row]
    rows = [(group, bool(success) and last, last) for group, success in episodes for last in (False, True)]
    group, success, done = (torch.tensor(column).unsqueeze(-1) for column in zip(*rows, strict=True))
    data = TensorDict(
        {
            "observation": {"state": torch.randn(len(rows), 4)},
            "group_id": group,
            "next": {
                "done": done,
                "success": success,
                "reward": success.float(),
                "num_control_steps": torch.full_like(group, K),
            },
        },
        batch_size=[len(rows)],
    )
    with torch.no_grad():
        return actor(data).exclude(("vla_action", "logits"))


def weights(actor: nn.Module) -> torch.Tensor:
    """All of them, `[P]`."""
    return nn.utils.parameters_to_vector(actor.parameters()).detach()
