"""What PPO and GRPO collect, learn from, judge and save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from torchrl_vla.config.environment import EnvironmentConfig
from torchrl_vla.config.validation import (
    fraction,
    non_negative,
    positive,
    temperature,
    warn_without_effect,
)
from torchrl_vla.errors import UserError

__all__ = ["PPOConfig"]

_GAE_ONLY = ("critic_lr", "gamma", "gae_lambda", "value_loss_coef", "bootstrap_at_horizon")
_GROUPS_ONLY = ("baseline", "keep_low", "keep_high", "verifier_gamma")


@dataclass
class PPOConfig(EnvironmentConfig):
    """PPO/GRPO: on which tasks, how much is collected, how it is learned from, how often it is judged and saved.

    Raises:
        ValueError: a value is out of range, or two of them exclude each other.

    Examples:
        >>> PPOConfig(task_id=0, num_envs=1).tasks, PPOConfig(task_ids=[0, 1, 2, 3], num_envs=4).tasks
        ([0], [0, 1, 2, 3])
    """

    LARGEST: ClassVar[Mapping[str, int]] = {
        **EnvironmentConfig.LARGEST,
        "total_timesteps": 10**12,
        "n_steps": 10**8,
        "n_epochs": 10_000,
        "group_size": 4096,
        "val_episodes": 100_000,
        "traj_mini_batch_size": 1_000_000,
        "keep_checkpoints": 10_000,
    }

    total_timesteps: Annotated[int, tyro.conf.arg(aliases=["--timesteps"])] = 100_000
    """Control steps (20 Hz) to collect in all; the run ends with the update that reaches it."""
    n_steps: int = 100
    """Least number of control steps per update, rounded up to whole groups of complete episodes."""
    batch_size: int | Literal["auto"] = 1
    """Decisions per forward and backward pass; auto: whatever is fastest in the GPU's memory, measured once. Gradients
    are accumulated: this changes memory and speed, never the gradient."""
    gradient_checkpointing: float | Literal["auto"] = "auto"
    """Share of the layers, 0 to 1, whose activations are computed again in the backward pass to save memory; auto: as
    few as the GPU's memory allows."""
    memory_gb: float | None = None
    """GPU memory that batch_size=auto and gradient_checkpointing=auto may fill, in GiB, as PyTorch reserves it; None:
    all that is free."""
    n_epochs: int = 10
    """Passes over the collected decisions per update."""

    actor_lr: float = 1e-5
    """Learning rate of the policy (AdamW)."""
    critic_lr: float = 3e-4
    """Learning rate of the value head; used with advantage_estimator=gae only."""
    lr_warmup_steps: int = 10
    """Optimizer steps over which the learning rates rise linearly to their values. AdamW's first steps are as large as
    its learning rate, however little they are sure of."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rates go on after the warm-up; linear and cosine fall to 0 at total_timesteps."""
    clip_ratio_high: float = 0.28
    """Upper clip: the ratio is cut at 1 + clip_ratio_high (DAPO's clip-higher, as in SimpleVLA-RL)."""
    clip_ratio_low: float = 0.2
    """Lower clip: the ratio is cut at 1 - clip_ratio_low."""
    dual_clip: float | None = None
    """Bounds the loss of negative advantages at this ratio (arXiv:1912.09729 uses 3); None: not used."""
    ratio_level: Literal["token", "action", "chunk"] = "token"
    """What one importance ratio covers: an action token, the 7 tokens of one action, or a whole chunk."""
    advantage_estimator: Literal["grpo", "rloo", "gae"] = "grpo"
    """grpo: returns normalised within a group; rloo: leave-one-out baseline; gae: value head and GAE."""
    baseline: Literal["group", "running"] = "group"
    """What a return is compared with at each decision: those of its whole group, or of those episodes of the group that
    still run then. running has less variance and leaves out the ends of failures; not used with gae."""
    group_size: int = 8
    """Episodes per group: the same task and initial state, tried this often."""
    keep_low: float = 0.0
    """Groups whose mean success is below this are dropped (dynamic sampling), besides those without a success or
    without a failure, which teach nothing; not used with gae."""
    keep_high: float = 1.0
    """Groups whose mean success is above this are dropped."""
    aggregation: Literal["token", "trajectory"] = "token"
    """What the loss averages over: token: all tokens of a mini-batch alike; trajectory: the tokens of each trajectory
    first, so that long ones, failures mostly, weigh no more than short ones (SimpleVLA-RL)."""
    gamma: float = 0.99
    """Discount per decision, used with advantage_estimator=gae."""
    gae_lambda: float = 0.95
    """GAE's lambda, used with advantage_estimator=gae."""
    bootstrap_at_horizon: bool = False
    """Add the value of the last observation where the horizon ends an episode; off: the horizon ends it like a failure,
    since running out of time is LIBERO's only one. Used with advantage_estimator=gae."""
    verifier_gamma: float = 1.0
    """Discount per decision of the return that groups compare; 1 counts success alone, whenever it came."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus; 0 turns it off."""
    value_loss_coef: float = 0.5
    """Weight of the value loss, used with advantage_estimator=gae."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    max_bad_updates: int = 3
    """Optimizer steps with a loss or gradient that is not finite are skipped; after this many in a row the run stops,
    its last checkpoint kept."""

    rollout_temperature: float = 1.6
    """Sampling temperature of the action tokens in rollouts; the update's probabilities use the same one."""
    eval_temperature: float = 0.0
    """Temperature of validation and evaluation; 0 is greedy."""
    kl_coef: float = 0.0
    """Weight of the KL penalty (k3 estimator) to the policy that the run started from; 0 turns it off."""
    reconstruction_coef: float = 0.0
    """Weight of an auxiliary squared error between the expected and the taken action; 0 turns it off."""

    traj_split_num: int = 4
    """A mini-batch of trajectories is split at least this often for gradient accumulation."""
    traj_mini_batch_size: int = 8
    """Trajectories' worth of decisions per optimizer step."""
    separate_rollout_training: bool = False
    """Rollouts and training on different GPUs. Not available yet."""

    val_interval: int = 1000
    """Validate every this many control steps (and before the first update); 0: never."""
    val_episodes: int = 10
    """Episodes per validation, spread evenly over the tasks, the same initial states each time; greedy ones
    (eval_temperature 0) run no state twice, so that there are at most as many as states."""
    val_videos: bool = True
    """Record videos of one success and one failure of each validation, in the run's videos/ and its loggers."""

    use_wandb: Annotated[bool, tyro.conf.arg(aliases=["--wandb"])] = False
    """Log to Weights & Biases too."""
    wandb_entity: str | None = None
    """W&B user or team."""
    log_interval: int = 1000
    """Write metrics every this many control steps, at the end of the update that passes it, and after a validation."""
    save_interval: int = 10_000
    """Write a checkpoint every this many control steps; the last update always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept besides the best one."""

    device: str = "auto"
    """Device of the policy: auto takes the GPU if there is one; else cpu, cuda, cuda:1, ..."""
    training_device: str = "auto"
    """Device of gradient computation. Must be `device` unless separate_rollout_training; auto: the same."""
    seed: int = 0
    """Seeds sampling, shuffling and the order of tasks and initial states."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            self, "total_timesteps", "n_steps", "batch_size", "memory_gb", "n_epochs", "actor_lr", "critic_lr",
            "clip_ratio_high", "clip_ratio_low", "max_grad_norm", "max_bad_updates", "traj_split_num",
            "traj_mini_batch_size", "log_interval", "save_interval", "keep_checkpoints", "group_size",
        )  # fmt: skip
        non_negative(
            self, "entropy_coef", "value_loss_coef", "kl_coef", "reconstruction_coef", "val_interval", "val_episodes",
            "lr_warmup_steps",
        )  # fmt: skip
        fraction(self, "gradient_checkpointing", "gamma", "gae_lambda", "verifier_gamma", "keep_low", "keep_high")
        positive(self, "verifier_gamma")
        temperature(self, "rollout_temperature", "eval_temperature")
        if self.clip_ratio_low >= 1:
            raise UserError(f"clip_ratio_low must be below 1 (ratios are positive), got {self.clip_ratio_low}.")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_ratio_high:
            raise UserError(
                f"dual_clip must exceed 1 + clip_ratio_high = {1 + self.clip_ratio_high}, got {self.dual_clip}."
            )
        if self.rollout_temperature == 0:
            raise UserError(
                "rollout_temperature must be positive, got 0: a greedy rollout explores nothing. Use eval_temperature "
                "for greedy evaluation."
            )
        if self.keep_low > self.keep_high:
            raise UserError(f"keep_low ({self.keep_low}) must not exceed keep_high ({self.keep_high}).")
        if self.advantage_estimator != "gae" and self.group_size < 2:
            raise UserError(
                f"group_size must be at least 2 with advantage_estimator={self.advantage_estimator}, got "
                f"{self.group_size}: a group of one episode has nothing to compare with. "
                "Raise it, or use advantage_estimator=gae."
            )
        if self.separate_rollout_training:
            raise UserError(
                "separate_rollout_training=True is not available yet: rollouts and training share one device."
            )
        if self.training_device != self.device and self.training_device != "auto":
            raise UserError(
                f"training_device ({self.training_device!r}) must equal device ({self.device!r}) unless "
                "separate_rollout_training is on."
            )
        other = (
            {name: "it is used with advantage_estimator=gae alone" for name in _GAE_ONLY}
            if self.advantage_estimator != "gae"
            else {name: "it is not used with advantage_estimator=gae" for name in _GROUPS_ONLY}
        )
        warn_without_effect(self, other)
