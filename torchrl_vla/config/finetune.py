"""Parameters of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from torchrl_vla.config.files import SavedConfig
from torchrl_vla.config.validation import check_fields, fraction, non_negative, positive
from torchrl_vla.errors import UserError

__all__ = ["FinetuneConfig"]


@dataclass
class FinetuneConfig(SavedConfig):
    """Supervised fine-tuning on demonstrations.

    The defaults train a tiny policy from nothing; docs/tiny_policy.md has the settings of the bundled one.

    For a released 7B checkpoint on one 80 GB card: ``--use-lora --actor-lr 5e-4 --mini-batch-size 8
    --ema-decay 0 --proprio-noise 0 --weight-decay 0.01``.

    Raises:
        ValueError: a value is out of range, or two of them exclude each other.

    Examples:
        >>> FinetuneConfig((Path("demos"),), Path("runs/tiny")).steps
        3500
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({
        "steps", "batch_size", "gradient_checkpointing", "compile", "device", "log_interval", "val_interval",
        "save_interval",
    })  # fmt: skip
    """What a resumed run may be given anew: how long it runs, how often it reports, what memory and device it uses."""

    LARGEST: ClassVar[Mapping[str, int]] = {"lora_rank": 65_536, "lora_alpha": 1_000_000, "mini_batch_size": 1_000_000}

    dataset: tuple[Path, ...]
    """Folders of demonstrations, from `torchrl-vla demos`: one, or several of different suites, which one policy then
    learns together."""
    run_dir: Path
    """Folder for everything the run writes; the finished policy is its subfolder `policy`."""
    pretrained_checkpoint: Annotated[str, tyro.conf.arg(aliases=["--checkpoint"])] = "random:tiny"
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
    mini_batch_size: int = 512
    """Decisions per optimizer step."""
    batch_size: int | None = None
    """Decisions per forward and backward pass; None: the whole mini-batch. Less saves memory and changes no
    gradient."""
    gradient_checkpointing: float = 0.0
    """Share of the layers, 0 to 1, whose activations are computed again in the backward pass to save memory."""
    actor_lr: float = 8e-4
    """Peak learning rate of the policy (AdamW, betas 0.9 and 0.95)."""
    weight_decay: float = 0.05
    """AdamW's decay of weight matrices; biases and norms are not decayed."""
    lr_warmup_steps: int = 300
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
    """Resume the run in run_dir from its last checkpoint, with its own options. How long it runs, how often it
    reports and what memory and device it uses may be given anew."""
    allow_changed: list[str] = field(default_factory=list)
    """Names of other options that a resumed run is given anew on purpose, such as actor_lr."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.dataset:
            raise UserError("dataset is empty: name at least one folder of demonstrations.")
        positive(
            self, "lora_rank", "lora_alpha", "episodes_per_task", "steps", "mini_batch_size", "batch_size", "actor_lr",
            "max_grad_norm", "log_interval", "val_interval", "save_interval",
        )  # fmt: skip
        non_negative(
            self, "target_sigma", "val_episodes_per_task", "weight_decay", "lr_warmup_steps", "proprio_noise",
            "brightness", "contrast", "saturation",
        )  # fmt: skip
        fraction(self, "gradient_checkpointing", "lora_dropout", "ema_decay", "crop_area", "hue")
        positive(self, "crop_area")
        for name in ("lora_dropout", "ema_decay"):
            if getattr(self, name) == 1:
                raise UserError(f"{name} must be below 1, got 1: nothing would be learned.")
        if self.allow_changed and not self.resume:
            raise UserError("allow_changed is for a run that is resumed: use --resume, or leave it out.")
        if self.lr_warmup_steps >= self.steps:
            raise UserError(
                f"lr_warmup_steps ({self.lr_warmup_steps}) must be below steps ({self.steps}): lower --lr-warmup-steps "
                "for a short run."
            )
        if self.batch_size is not None and self.mini_batch_size % self.batch_size:
            raise UserError(
                f"batch_size ({self.batch_size}) must divide mini_batch_size ({self.mini_batch_size}) evenly."
            )
        if self.num_images_in_input not in (1, 2):
            raise UserError(f"num_images_in_input must be 1 or 2, got {self.num_images_in_input}.")
        if self.freeze_l1_action_head and self.objective != "l1":
            raise UserError("freeze_l1_action_head needs objective=l1: with tokens the L1 head is never trained.")
        if self.freeze_vla_backbone and (self.use_lora or self.freeze_l1_action_head):
            raise UserError("freeze_vla_backbone trains the heads only: leave out use_lora and freeze_l1_action_head.")
        if self.freeze_vla_backbone and self.objective == "tokens":
            raise UserError("freeze_vla_backbone needs objective=l1: the action tokens' head is part of the backbone.")
