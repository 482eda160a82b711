"""Small networks around the language model: state values, L1 actions and the proprioception token."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_vla.errors import UserError


class ValueHead(nn.Sequential):
    """State value from a pooled hidden state, ``D -> 1024 -> 512 -> 1`` with ReLU.

    The input is brought to the head's own dtype and device, so that a float32 head can sit on a bfloat16 model, and on
    another GPU; the value goes back to the input's device.

    Args:
        hidden_size: width ``D`` of the hidden state.
        hidden_dims: widths of the two hidden layers.

    Example:
        >>> import torch
        >>> ValueHead(256)(torch.zeros(4, 256)).shape
        torch.Size([4, 1])
    """

    def __init__(self, hidden_size: int, hidden_dims: tuple[int, int] = (1024, 512)) -> None:
        if hidden_size <= 0 or min(hidden_dims) <= 0:
            raise UserError(f"widths must be positive, got hidden_size={hidden_size}, hidden_dims={hidden_dims}.")
        first, second = hidden_dims
        super().__init__(
            nn.Linear(hidden_size, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to values [..., 1]."""
        weight = next(self.parameters())
        return super().forward(hidden.to(weight.device, weight.dtype)).to(hidden.device)


class ProprioProjector(nn.Module):
    """The robot's state as one token, ``fc2(gelu(fc1(x)))`` with exact GELU.

    Args:
        proprio_dim: length of the state (8 on LIBERO).
        hidden_size: width ``D`` of the language model.
    """

    def __init__(self, proprio_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, proprio: Tensor) -> Tensor:
        """Normalised state [B, proprio_dim] to [B, D], in the projector's dtype."""
        return self.fc2(F.gelu(self.fc1(proprio.to(self.fc1.weight.dtype))))


class _ResidualBlock(nn.Module):
    """``x + relu(linear(layer_norm(x)))``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class _ResidualMLP(nn.Module):
    """LayerNorm, linear, ReLU, residual blocks, LayerNorm, linear."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.mlp_resnet_blocks = nn.ModuleList([_ResidualBlock(hidden_dim) for _ in range(num_blocks)])
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1ActionHead(nn.Module):
    """OpenVLA-OFT's regression head: one control step from the hidden states of its ``action_dim`` rows.

    Args:
        hidden_size: width ``D`` of the hidden states.
        action_dim: numbers per control step.

    Reference: `OpenVLA-OFT <https://arxiv.org/abs/2502.19645>`_. Parameter names are those of its
    ``action_head--N_checkpoint.pt``.
    """

    def __init__(self, hidden_size: int, action_dim: int = 7) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = _ResidualMLP(hidden_size * action_dim, hidden_size, action_dim, num_blocks=2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [B, K*action_dim, D] to normalised actions [B, K, action_dim] on their device, not clipped."""
        batch, rows, width = hidden_states.shape
        steps = hidden_states.reshape(batch, rows // self.action_dim, self.action_dim * width)
        weight = self.model.fc1.weight
        return self.model(steps.to(weight.device, weight.dtype)).to(hidden_states.device)
