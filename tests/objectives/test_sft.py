"""Supervised losses: hand-computed values, masks, soft targets."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_vla.objectives.sft import ActionL1Loss, TokenCrossEntropyLoss


def token_loss(**options) -> TokenCrossEntropyLoss:
    network = TensorDictModule(nn.Identity(), in_keys=["given"], out_keys=[("vla_action", "logits")])
    return TokenCrossEntropyLoss(network, **options)


def token_batch(logits: torch.Tensor, tokens: torch.Tensor, **entries: torch.Tensor) -> TensorDict:
    return TensorDict({"given": logits, ("vla_action", "tokens"): tokens, **entries}, [len(tokens)])


def test_cross_entropy_by_hand():
    # One decision of one step with two numbers, three bins.
    logits = torch.tensor([[[[0.0, math.log(2.0), 0.0], [math.log(7.0), 0.0, 0.0]]]])
    terms = token_loss(bin_centers=torch.tensor([1.0, 0.0, -1.0]))(token_batch(logits, torch.tensor([[[1, 2]]])))
    assert terms["loss_tokens"].item() == pytest.approx((math.log(2.0) + math.log(9.0)) / 2)
    assert terms["accuracy"].item() == 0.5
    assert terms["l1"].item() == pytest.approx((0.0 + 2.0) / 2)
    entropies = [2 * 0.25 * math.log(4) + 0.5 * math.log(2), 7 / 9 * math.log(9 / 7) + 2 / 9 * math.log(9)]
    assert terms["entropy"].item() == pytest.approx(sum(entropies) / 2, abs=1e-6)


def test_masked_steps_do_not_count_whatever_they_hold():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, 5).requires_grad_()
    tokens = torch.randint(0, 5, (2, 3, 7))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    alone = token_loss()(token_batch(logits[mask].unsqueeze(0), tokens[mask].unsqueeze(0)))
    garbled = logits.clone()
    garbled.data[~mask] = 1e4
    masked = token_loss()(token_batch(garbled, tokens, mask=mask))
    for name in ("loss_tokens", "accuracy", "entropy"):
        torch.testing.assert_close(masked[name], alone[name])
    masked["loss_tokens"].backward()
    assert (logits.grad[~mask] == 0).all() and (logits.grad[mask] != 0).any()


def test_actions_that_were_never_executed_do_not_count():
    """In a policy's own episodes, which may end inside a chunk; a mask and TorchRL's own hold beside it."""
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 3, 7, 5), torch.randint(0, 5, (3, 3, 7))
    batch = token_batch(logits, tokens)
    batch["next", "num_control_steps"] = torch.tensor([[2], [3], [1]])
    batch["mask"] = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
    batch["collector", "mask"] = torch.tensor([[True], [True], [False]])
    kept = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    expected = token_loss()(token_batch(logits[kept].unsqueeze(0), tokens[kept].unsqueeze(0)))
    torch.testing.assert_close(token_loss()(batch)["loss_tokens"], expected["loss_tokens"])
    network = TensorDictModule(nn.Identity(), in_keys=["given"], out_keys=[("vla_action", "prediction")])
    actions = batch.set("given", torch.randn(3, 3, 7)).set(("vla_action", "chunk"), torch.zeros(3, 3, 7))
    torch.testing.assert_close(ActionL1Loss(network)(actions)["loss_l1"], actions["given"][kept].abs().mean())


def test_a_call_with_keywords_lets_the_network_write_beside_the_tokens():
    def network(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return given.unflatten(1, (3, 7, 5)), given

    outputs = [("vla_action", "logits"), ("vla_action", "hidden")]
    loss = TokenCrossEntropyLoss(TensorDictModule(network, in_keys=["given"], out_keys=outputs))
    logits, tokens = torch.randn(2, 3, 7, 5), torch.zeros(2, 3, 7, dtype=torch.int64)
    loss.out_keys = ["loss_tokens"]
    given = loss(given=logits.flatten(1), vla_action_tokens=tokens)
    torch.testing.assert_close(given, token_loss()(token_batch(logits, tokens))["loss_tokens"])


def test_soft_targets_prefer_a_near_miss():
    tokens = torch.tensor([[[4]]])

    def loss_at(bin_index: int, sigma: float) -> float:
        logits = torch.full((1, 1, 1, 9), -8.0)
        logits[..., bin_index] = 8.0
        return token_loss(target_sigma=sigma)(token_batch(logits, tokens))["loss_tokens"].item()

    assert loss_at(5, 0.0) == pytest.approx(loss_at(8, 0.0))
    assert loss_at(4, 1.0) < loss_at(5, 1.0) < loss_at(8, 1.0)
    weights = [math.exp(-0.5 * (b - 4) ** 2) for b in range(9)]
    target = torch.tensor(weights) / sum(weights)
    expected = -(target * torch.log_softmax(torch.zeros(9), 0)).sum()
    assert token_loss(target_sigma=1.0)(token_batch(torch.zeros(1, 1, 1, 9), tokens))["loss_tokens"] == expected


def test_soft_targets_of_no_width_are_rejected():
    with pytest.raises(ValueError, match="target_sigma"):
        token_loss(target_sigma=-1.0)


def test_l1_by_hand_with_a_mask():
    network = TensorDictModule(nn.Identity(), in_keys=["given"], out_keys=[("vla_action", "prediction")])
    target = torch.tensor([[[1.0, -1.0], [9.0, 9.0]]])
    batch = TensorDict(
        {
            "given": torch.zeros(1, 2, 2),
            ("vla_action", "chunk"): target,
            "mask": torch.tensor([[True, False]]),
        },
        [1],
    )
    assert ActionL1Loss(network)(batch)["loss_l1"].item() == 1.0
    assert ActionL1Loss(network)(batch.exclude("mask"))["loss_l1"].item() == 5.0


def test_parameters_get_gradients_and_the_batch_stays_clean():
    network = TensorDictModule(nn.Linear(4, 6), in_keys=["x"], out_keys=[("vla_action", "logits")])
    loss = TokenCrossEntropyLoss(network)
    batch = TensorDict({"x": torch.randn(5, 2, 7, 4), ("vla_action", "tokens"): torch.zeros(5, 2, 7).long()}, [5])
    loss(batch)["loss_tokens"].backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert ("vla_action", "logits") not in batch.keys(True)
