from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchrl_vla.modules.heads import L1ActionHead, ProprioProjector, ValueHead


def test_value_head_layers_and_dtype() -> None:
    head = ValueHead(4096)
    assert [tuple(p.shape) for p in head.parameters()] == [(1024, 4096), (1024,), (512, 1024), (512,), (1, 512), (1,)]
    value = head(torch.randn(2, 3, 4096, dtype=torch.bfloat16))
    assert value.shape == (2, 3, 1) and value.dtype == torch.float32


def test_value_head_by_hand() -> None:
    head = ValueHead(1, hidden_dims=(2, 1))
    with torch.no_grad():
        values = ([[1.0], [-1.0]], [0.0, 0.0], [[2.0, 3.0]], [1.0], [[-1.0]], [0.5])
        for parameter, value in zip(head.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    # x = 4: relu (4, -4) -> (4, 0); 2*4 + 1 = 9; -9 + 0.5.  x = -4: (0, 4); 3*4 + 1 = 13; -13 + 0.5
    torch.testing.assert_close(head(torch.tensor([[4.0], [-4.0]])), torch.tensor([[-8.5], [-12.5]]))


@pytest.mark.parametrize("arguments", [(0,), (4, (0, 1))])
def test_value_head_widths_are_positive(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="widths must be positive"):
        ValueHead(*arguments)


def test_proprio_projector_uses_exact_gelu() -> None:
    head = ProprioProjector(1, 1)
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), (1.0, 0.0, 1.0, 0.0), strict=True):
            parameter.fill_(value)
    # x * Phi(x): Phi(1) = 0.8413447461; the tanh form gives 0.8411919906
    assert abs(head(torch.ones(1, 1)).item() - 0.8413447461) < 1e-6


def test_l1_head_groups_rows_by_control_step() -> None:
    """Each control step reads its own seven rows, and nothing bounds the result."""
    head = L1ActionHead(4)
    hidden = torch.randn(2, 14, 4)
    first = head(hidden)
    assert first.shape == (2, 2, 7)
    changed = hidden.clone()
    changed[:, 7:] += 1.0 * torch.randn(2, 7, 4)
    second = head(changed)
    torch.testing.assert_close(second[:, 0], first[:, 0])
    assert (second[:, 1] - first[:, 1]).abs().max() > 1e-3
    with torch.no_grad():
        head.model.fc2.bias.fill_(5.0)
    assert head(hidden).min() > 1.0


def test_l1_head_against_its_formula() -> None:
    head = L1ActionHead(4)
    state = {name: torch.randn_like(value) for name, value in head.state_dict().items()}
    head.load_state_dict(state)
    hidden = torch.randn(1, 7, 4)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = norm(hidden.reshape(1, 28), "model.layer_norm1")
    x = (x @ state["model.fc1.weight"].T + state["model.fc1.bias"]).clamp_min(0)
    for block in ("model.mlp_resnet_blocks.0.ffn", "model.mlp_resnet_blocks.1.ffn"):
        x = x + F.relu(norm(x, f"{block}.0") @ state[f"{block}.1.weight"].T + state[f"{block}.1.bias"])
    expected = norm(x, "model.layer_norm2") @ state["model.fc2.weight"].T + state["model.fc2.bias"]
    torch.testing.assert_close(head(hidden)[:, 0], expected, atol=1e-5, rtol=1e-5)
