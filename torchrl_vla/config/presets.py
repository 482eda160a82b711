"""Starting points for `torchrl-vla train`: values that work together on one kind of machine."""

from __future__ import annotations

from collections.abc import Callable

from torchrl_vla.config import OpenVLAActorConfig, PPOConfig, TrainConfig
from torchrl_vla.config.releases import TOKEN_CHECKPOINTS
from torchrl_vla.errors import UserError

__all__ = ["PRESETS", "choose_preset"]


def _tiny() -> TrainConfig:
    """Train a small OpenVLA on a machine without a GPU: minutes, to see everything work."""
    return TrainConfig(
        preset="tiny",
        ppo=PPOConfig(
            num_envs=8,
            total_timesteps=7_500,
            n_steps=1_500,
            batch_size=32,
            n_epochs=1,
            actor_lr=2e-5,
            entropy_coef=0.0,
            rollout_temperature=1.0,
            val_interval=4_000,
            val_episodes=8,
            log_interval=1,
            save_interval=4_000,
        ),
        actor=OpenVLAActorConfig(pretrained_checkpoint="bundled:tiny", use_lora=False),
    )


def _24gb() -> TrainConfig:
    """OpenVLA-OFT 7B with LoRA on one 24 GB card."""
    return TrainConfig(
        preset="24gb",
        ppo=PPOConfig(num_envs=8, batch_size="auto", memory_gb=22.0, entropy_coef=0.0),
        actor=OpenVLAActorConfig(pretrained_checkpoint=TOKEN_CHECKPOINTS[0]),
    )


def _80gb() -> TrainConfig:
    """OpenVLA-OFT 7B with LoRA on one 80 GB card."""
    return TrainConfig(
        preset="80gb",
        ppo=PPOConfig(num_envs=16, batch_size="auto", entropy_coef=0.0),
        actor=OpenVLAActorConfig(pretrained_checkpoint=TOKEN_CHECKPOINTS[0]),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"tiny": _tiny, "24gb": _24gb, "80gb": _80gb}


def choose_preset(name: str = "auto") -> str:
    """Return the preset's name; auto chooses by the GPU's memory, and tiny where there is no GPU or 7B does not fit.

    Args:
        name: auto, or one of `PRESETS`.

    Raises:
        ValueError: there is no such preset.

    Examples:
        >>> choose_preset("tiny")
        'tiny'
    """
    if name != "auto":
        if name not in PRESETS:
            raise UserError(f"No preset {name!r}: choose auto, {', '.join(PRESETS)}.")
        return name
    import torch

    if not torch.cuda.is_available():
        return "tiny"
    gibibytes = torch.cuda.get_device_properties(0).total_memory / 2**30
    return "80gb" if gibibytes > 60 else "24gb" if gibibytes > 20 else "tiny"
