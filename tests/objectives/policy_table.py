"""A policy of numbers in a table, and batches for it whose losses can be worked out by hand."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ValueOperator

from torchrl_vla.objectives import AsymmetricClipPPOLoss

# Ratios new/old of two decisions (K=2 control steps of 2 dimensions) and their advantages.
RATIOS = torch.tensor([[[1.5, 0.5], [1.1, 1.2]], [[1.5, 0.5], [0.9, 1.0]]])
ADVANTAGE = torch.tensor([[1.0], [-2.0]])


class Table(nn.Module):
    """Logits [N, K, D, V] looked up by row, an adapter that adds to them, and a hidden state made of them."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.adapter = nn.Parameter(torch.zeros(()))
        self.adapter_enabled = True
        self.calls = 0

    def forward(self, row: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        logits = self.logits[row]
        if self.adapter_enabled:
            logits = torch.cat([logits[..., :1] + self.adapter, logits[..., 1:]], -1)
        return logits, logits.flatten(1).nan_to_num()[:, :3]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.adapter_enabled = False
        yield
        self.adapter_enabled = True


def make_actor(table: nn.Module, event_dims: int = 0) -> ProbabilisticTensorDictSequential:
    def distribution(logits: Tensor) -> torch.distributions.Distribution:
        tokens = torch.distributions.Categorical(logits=logits, validate_args=False)
        return torch.distributions.Independent(tokens, event_dims, validate_args=False) if event_dims else tokens

    return ProbabilisticTensorDictSequential(
        TensorDictModule(table, in_keys=["row"], out_keys=[("vla_action", "logits"), ("vla_action", "hidden")]),
        ProbabilisticTensorDictModule(
            in_keys={"logits": ("vla_action", "logits")},
            out_keys=[("vla_action", "tokens")],
            distribution_class=distribution,
            return_log_prob=True,
            log_prob_key=("vla_action", "log_probs"),
        ),
    )


def make_batch(ratios: Tensor = RATIOS, advantage: Tensor = ADVANTAGE) -> tuple[Table, TensorDict]:
    """Uniform logits over two tokens, and old log-probabilities that give the ratios."""
    table = Table(torch.zeros(*ratios.shape, 2))
    action = {"tokens": torch.zeros(ratios.shape, dtype=torch.int64), "log_probs": -math.log(2) - ratios.log()}
    data = {"row": torch.arange(len(ratios)), "vla_action": action, "advantage": advantage}
    return table, TensorDict(data, [len(ratios)])


def random_batch(size: int = 9, seed: int = 0) -> tuple[Table, TensorDict]:
    generator = torch.Generator().manual_seed(seed)
    table = Table(torch.randn(size, 2, 3, 5, generator=generator, dtype=torch.float64))
    table.adapter.data = torch.tensor(0.3, dtype=torch.float64)
    data = TensorDict({"row": torch.arange(size)}, [size])
    with torch.no_grad():
        make_actor(table)(data)
    noise = torch.randn(size, 2, 3, generator=generator, dtype=torch.float64)
    data["vla_action", "log_probs"] += 0.4 * noise
    del data["vla_action", "logits"], data["vla_action", "hidden"]
    for key in ("advantage", "value_target", "state_value"):
        data[key] = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    data["vla_action", "chunk"] = torch.rand(size, 2, 3, generator=generator, dtype=torch.float64)
    data["mask"] = torch.rand(size, 2, generator=generator) > 0.4
    data["mask"][0] = False
    return table, data


def total(terms: TensorDict) -> Tensor:
    return sum(value for key, value in terms.items() if key.startswith("loss_"))


def with_every_term(table: nn.Module, level: str) -> AsymmetricClipPPOLoss:
    return AsymmetricClipPPOLoss(
        make_actor(table),
        ValueOperator(nn.Linear(3, 1).double(), in_keys=[("vla_action", "hidden")]),
        ratio_level=level,
        entropy_coeff=0.1,
        kl_coeff=0.2,
        reference_context=table.disable_adapter,
        reconstruction_coeff=0.3,
        bin_centers=torch.linspace(-1, 1, 5).double(),
        clip_value=0.2,
    )
