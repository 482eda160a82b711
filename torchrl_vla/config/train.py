"""One training run: `torchrl-vla train`, `torchrl_vla.recipes.grpo.train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from torchrl_vla.config.actor import OpenVLAActorConfig
from torchrl_vla.config.files import SavedConfig
from torchrl_vla.config.ppo import PPOConfig
from torchrl_vla.config.validation import check_fields, positive
from torchrl_vla.errors import UserError

__all__ = ["TrainConfig"]


@dataclass
class TrainConfig(SavedConfig):
    """One training run.

    Raises:
        ValueError: a value is out of range, or resume lacks its folder.

    Examples:
        >>> TrainConfig(ppo=PPOConfig(task_ids=[0, 1, 2, 3], num_envs=4)).ppo.tasks
        [0, 1, 2, 3]
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({
        "total_timesteps", "num_envs", "worker_timeout", "batch_size", "gradient_checkpointing", "memory_gb",
        "traj_split_num", "max_bad_updates", "val_interval", "val_episodes", "val_videos", "use_wandb", "wandb_entity",
        "log_interval", "save_interval", "keep_checkpoints", "device", "training_device", "use_local", "use_multi_gpu",
        "gpu_id", "secondary_gpu_id", "compile", "use_flash_attention", "profile",
    })  # fmt: skip
    """What a resumed run may be given anew: how long it runs, how often it reports, what memory and devices it uses."""

    ppo: PPOConfig = field(default_factory=PPOConfig)
    actor: OpenVLAActorConfig = field(default_factory=OpenVLAActorConfig)
    preset: Literal["auto", "tiny", "24gb", "80gb"] | None = None
    """Where the other options' defaults come from: auto chooses by the GPU's memory, tiny runs on a CPU, 24gb and 80gb
    train OpenVLA 7B on one card. In Python, `PRESETS[name]()` makes one; a run notes the name."""
    run_dir: Path | None = None
    """Folder for everything the run writes; None: runs/SUITE-DATE-TIME. Must not exist yet, unless resumed."""
    resume: bool = False
    """Resume the run in run_dir from its last checkpoint, with its own options. What says how long it runs, how often
    it reports and what memory and devices it uses may be given anew; docs/running.md has the list."""
    allow_changed: list[str] = field(default_factory=list)
    """Names of other options that a resumed run is given anew on purpose, such as actor_lr."""
    profile: int | None = None
    """Write a torch.profiler trace of this update, counted from 1, to the run's folder; None: none."""

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self, "profile")
        if self.allow_changed and not self.resume:
            raise UserError("allow_changed is for a run that is resumed: use --resume, or leave it out.")
        if self.resume and self.run_dir is None:
            raise UserError("resume needs run_dir: the folder of the run to resume.")
