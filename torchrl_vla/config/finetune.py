"""Parameters of supervised fine-tuning."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["FinetuneConfig"]


@dataclass
class FinetuneConfig:
    """Supervised fine-tuning on demonstrations. The defaults train a tiny policy from nothing; docs/tiny_policy.md has
    the settings of the bundled one.

    For a released 7B checkpoint on one 80 GB card: ``--use-lora --learning-rate 5e-4 --batch-size 8 --ema-decay 0
    --proprio-noise 0 --weight-decay 0.01``.

    Raises:
        ValueError: a value is out of range, or two of them exclude each other.

    Examples:
        >>> FinetuneConfig(Path("demos"), Path("runs/tiny")).steps
        3500
    """

    dataset: Path
    """Folder of demonstrations, from `torchrl-vla demos`."""
    out: Path
    """Folder for everything the run writes; the finished policy is its subfolder `policy`."""
    checkpoint: str = "random:tiny"
    """Policy to start from: a folder or hub id of an OpenVLA checkpoint, the folder of a run, or bundled:tiny, which
    comes with the package; random:tiny builds a small untrained one."""
    objective: Literal["tokens", "l1"] = "tokens"
    """tokens: cross-entropy of action tokens, what RL needs; l1: regression by the L1 head, which is added if the
    checkpoint has none."""
    finetuned_on_discrete_actions: bool = False
    """The maker of a checkpoint with an L1 head says that its action tokens were trained too."""
    target_sigma: float = 0.0
    """Soft targets: neighbouring bins share the target by a normal density of this width in bins; 0: hard targets."""

    use_lora: bool = False
    """Train LoRA adapters (and the heads) instead of the weights; they are merged into the finished policy."""
    lora_rank: int = 32
    """Rank of the adapters."""
    lora_alpha: int = 16
    """Scale of the adapters, capped at min(rank, 16)."""
    lora_dropout: float = 0.0
    """Dropout inside the adapters."""
    freeze_vla_backbone: bool = False
    """Train the heads only."""
    num_images_in_input: int = 1
    """Cameras the policy looks through: 1 agentview, 2 with the wrist camera, which the demonstrations must have."""
    freeze_l1_action_head: bool = False
    """With objective=l1: train the network below the L1 head and keep the head as it is."""

    episodes_per_task: int | None = None
    """Demonstrations of each task to learn from; 1 is SimpleVLA-RL's one-trajectory mode; None: all."""
    val_episodes_per_task: int = 1
    """Demonstrations of each task held out for validation."""

    steps: int = 3500
    """Optimizer steps."""
    batch_size: int = 512
    """Decisions per optimizer step."""
    micro_batch_size: int | None = None
    """Decisions per forward and backward pass, if not all at once: saves memory, changes no gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: saves memory, costs a second forward."""
    learning_rate: float = 8e-4
    """Peak learning rate of AdamW (betas 0.9 and 0.95)."""
    weight_decay: float = 0.05
    """AdamW's decay of weight matrices; biases and norms are not decayed."""
    warmup_steps: int = 300
    """Steps of linear warm-up; a cosine to zero follows."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.999
    """Decay of the running average of the weights that validation and the finished policy use; 0: no average."""

    crop_area: float = 0.9
    """Random crop: share of the image's area; evaluation cuts 0.9 out of the centre."""
    brightness: float = 0.2
    """Largest random shift of brightness."""
    contrast: float = 0.2
    """Largest random relative change of contrast."""
    saturation: float = 0.2
    """Largest random relative change of saturation."""
    hue: float = 0.05
    """Largest random turn of the hue; 1 is the full circle."""
    proprio_noise: float = 0.01
    """Standard deviation of noise on the normalised state."""

    compile: bool | None = None
    """torch.compile the network; None: on a GPU."""
    device: str = "auto"
    """Device: auto takes the GPU if there is one."""
    seed: int = 0
    """Seeds initialisation, order and augmentation."""
    log_interval: int = 50
    """Write metrics every this many steps."""
    val_interval: int = 500
    """Validate every this many steps and at the end."""
    save_interval: int = 1000
    """Write a checkpoint to resume from every this many steps and at the end."""
    resume: bool = False
    """Go on with the run in `out` from its last checkpoint."""

    def __post_init__(self) -> None:
        positive = (
            "lora_rank", "lora_alpha", "steps", "batch_size", "learning_rate", "max_grad_norm", "log_interval",
            "val_interval", "save_interval",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("target_sigma", "val_episodes_per_task", "weight_decay", "warmup_steps", "proprio_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.episodes_per_task is not None and self.episodes_per_task < 1:
            raise ValueError(
                f"episodes_per_task must be at least 1, or left out for all, got {self.episodes_per_task}."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}.")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps}): lower --warmup-steps for a "
                "short run."
            )
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) must divide batch_size ({self.batch_size}) evenly."
            )
        if self.num_images_in_input not in (1, 2):
            raise ValueError(f"num_images_in_input must be 1 or 2, got {self.num_images_in_input}.")
        if self.freeze_l1_action_head and self.objective != "l1":
            raise ValueError("freeze_l1_action_head needs objective=l1: with tokens the L1 head is never trained.")
        if self.freeze_vla_backbone and (self.use_lora or self.freeze_l1_action_head):
            raise ValueError("freeze_vla_backbone trains the heads only: leave out use_lora and freeze_l1_action_head.")
        if self.freeze_vla_backbone and self.objective == "tokens":
            raise ValueError("freeze_vla_backbone needs objective=l1: the action tokens' head is part of the backbone.")

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n")

    @classmethod
    def load(cls, path: Path) -> FinetuneConfig:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it is of a run of another command or version.
        """
        if not path.is_file():
            raise ValueError(
                f"{path.parent} is not the folder of a fine-tuning: it has no {path.name}. Leave out --resume to start "
                "one."
            )
        values = json.loads(path.read_text())
        try:
            paths = {name: Path(values[name]) for name in ("dataset", "out")}
            return cls(**{**values, **paths})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} was not written by this version of `torchrl-vla finetune`: {error}.") from error
