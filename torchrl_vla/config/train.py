"""Every parameter of a run: typed, validated, documented once; the command line is made from these classes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["EnvironmentConfig", "OpenVLAActorConfig", "PPOConfig", "TrainConfig"]


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}.")


def _non_negative(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}.")


def _fraction(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")


@dataclass
class PPOConfig:
    """PPO/GRPO: how much is collected, how it is learned from, how often it is judged and saved.

    Raises:
        ValueError: a value is out of range, or two of them exclude each other.

    Examples:
        >>> from torchrl_vla.config import PPOConfig
        >>> PPOConfig(group_size=4, clip_ratio_high=0.3).clip_ratio_low
        0.2
    """

    total_timesteps: Annotated[int, tyro.conf.arg(aliases=["--timesteps"])] = 100_000
    """Control steps (20 Hz) to collect in all; the run ends with the update that reaches it."""
    n_steps: int = 100
    """Least number of control steps per update, rounded up to whole groups of complete episodes."""
    batch_size: int | Literal["auto"] = 1
    """Decisions per forward and backward pass; auto: whatever is fastest in the GPU's memory, measured once. Gradients
    are accumulated: this changes memory and speed, never the gradient."""
    recompute: float | Literal["auto"] = "auto"
    """Share of the layers, 0 to 1, that are computed again in the backward pass to save memory; auto: as few as the
    GPU's memory allows."""
    memory_gb: float | None = None
    """GPU memory that batch_size=auto and recompute=auto may fill, in GiB, as PyTorch reserves it; None: all that is
    free."""
    n_epochs: int = 10
    """Passes over the collected decisions per update."""

    actor_lr: float = 1e-5
    """Learning rate of the policy (AdamW)."""
    critic_lr: float = 3e-4
    """Learning rate of the value head; used with advantage_estimator=gae only."""
    lr_warmup_steps: int = 10
    """Optimizer steps over which the learning rates rise linearly to their values. AdamW's first steps are as large as
    its learning rate, however little they are sure of."""
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
    keep_low: float = 0.1
    """Groups whose mean success is below this are dropped (dynamic sampling); not used with gae."""
    keep_high: float = 0.9
    """Groups whose mean success is above this are dropped."""
    gamma: float = 0.99
    """Discount per decision, used with advantage_estimator=gae."""
    gae_lambda: float = 0.95
    """GAE's lambda, used with advantage_estimator=gae."""
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
    """Film one success and one failure of each validation, into the run's videos/ and to its loggers."""

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
    """Device of gradient computation. Must be `device` unless separate_rollout_training."""
    seed: int = 0
    """Seeds sampling, shuffling and the order of tasks and initial states."""

    def __post_init__(self) -> None:
        _positive(
            self, "total_timesteps", "n_steps", "n_epochs", "actor_lr", "critic_lr", "clip_ratio_high",
            "clip_ratio_low", "max_grad_norm", "max_bad_updates", "traj_split_num", "traj_mini_batch_size",
            "log_interval", "save_interval", "keep_checkpoints", "group_size",
        )  # fmt: skip
        _non_negative(
            self, "entropy_coef", "value_loss_coef", "kl_coef", "reconstruction_coef", "eval_temperature",
            "val_interval", "val_episodes", "lr_warmup_steps",
        )  # fmt: skip
        _fraction(self, "gamma", "gae_lambda", "verifier_gamma", "keep_low", "keep_high")
        _positive(self, "verifier_gamma")
        if self.batch_size != "auto":
            _positive(self, "batch_size")
        if self.recompute != "auto":
            _fraction(self, "recompute")
        if self.memory_gb is not None:
            _positive(self, "memory_gb")
        if self.clip_ratio_low >= 1:
            raise ValueError(f"clip_ratio_low must be below 1 (ratios are positive), got {self.clip_ratio_low}.")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_ratio_high:
            raise ValueError(
                f"dual_clip must exceed 1 + clip_ratio_high = {1 + self.clip_ratio_high}, got {self.dual_clip}."
            )
        if self.rollout_temperature <= 0:
            raise ValueError(
                f"rollout_temperature must be positive, got {self.rollout_temperature}: a greedy rollout explores "
                "nothing. Use eval_temperature for greedy evaluation."
            )
        if self.keep_low > self.keep_high:
            raise ValueError(f"keep_low ({self.keep_low}) must not exceed keep_high ({self.keep_high}).")
        if self.advantage_estimator != "gae" and self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2 with advantage_estimator={self.advantage_estimator}, got "
                f"{self.group_size}: a group of one episode has nothing to compare with. "
                "Raise it, or use advantage_estimator=gae."
            )
        if self.separate_rollout_training:
            raise ValueError(
                "separate_rollout_training=True is not available yet: rollouts and training share one device."
            )
        if self.training_device != self.device and self.training_device != "auto":
            raise ValueError(
                f"training_device ({self.training_device!r}) must equal device ({self.device!r}) unless "
                "separate_rollout_training is on."
            )


@dataclass
class EnvironmentConfig:
    """LIBERO: which tasks, from which initial states, how the robot is seen and driven.

    Raises:
        ValueError: a value is out of range. Suite and task names are checked when the suite is opened.
    """

    task_suite: str = "libero_spatial"
    """LIBERO suite (libero_spatial, libero_object, libero_goal, libero_10, libero_90) or one of LIBERO-PRO's."""
    task_ids: list[int] | None = None
    """Tasks to train on, e.g. 0 1 2 3; None: task_id alone."""
    task_id: int = 0
    """The task, if task_ids is not given."""
    num_envs: int = 1
    """Simulators run side by side; need not equal the number of tasks."""
    obs_mode: Literal["image_state"] = "image_state"
    """Camera images and robot state: what a VLA reads."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of the policy's input image; must be what the checkpoint was made for."""
    camera_size: int = 256
    """Height and width of the rendered camera images, in pixels."""
    max_episode_steps: int | None = None
    """Horizon in control steps; None: the suite's own (220 / 280 / 300 / 520 / 400)."""
    settle_steps: int = 10
    """Control steps waited after an initial state is set, as in the evaluation protocol."""
    init_state_ids: list[int] | None = None
    """Initial states to train from; None: all of the task's."""
    val_init_state_ids: list[int] | None = None
    """Initial states to validate from; None: all of the task's, in order."""
    proprio_format: Literal["axis_angle", "quaternion"] = "axis_angle"
    """axis_angle: position 3 + axis-angle 3 + gripper 2, what released OFT checkpoints were trained on; quaternion:
    position 3 + quaternion w, x, y, z + gripper 1."""
    reward_scale: float = 1.0
    """Reward of a success."""
    fidelity: Literal["exact", "fast"] = "exact"
    """exact: stock LIBERO's bits; fast: cheaper physics and pictures (no anti-aliasing, mirrors or details of 2 mm).
    Judge policies with exact."""
    worker_timeout: float = 120.0
    """Seconds after which a simulating process that does not answer is replaced and its episodes run again; five times
    as long while it starts and resets."""

    def __post_init__(self) -> None:
        _positive(self, "num_envs", "camera_size", "reward_scale", "worker_timeout")
        _non_negative(self, "task_id", "settle_steps")
        if min(self.image_size) <= 0 or self.image_size[0] != self.image_size[1]:
            raise ValueError(
                f"image_size must be square and positive, as OpenVLA's towers are, got {tuple(self.image_size)}."
            )
        if self.max_episode_steps is not None:
            _positive(self, "max_episode_steps")
        for name in ("task_ids", "init_state_ids", "val_init_state_ids"):
            ids = getattr(self, name)
            if ids is None:
                continue
            if not ids:
                raise ValueError(f"{name} is empty: name at least one, or leave it out.")
            if len(set(ids)) != len(ids):
                raise ValueError(f"{name} has duplicates: {ids}. Name each once.")
            if min(ids) < 0:
                raise ValueError(f"{name} must not be negative, got {ids}.")

    @property
    def simulation(self) -> dict[str, Any]:
        """What makes the same initial state and the same actions the same episode.

        The seed moves the scene's fixtures. It is the protocol's 0, whatever else a run draws at random.
        """
        return {"fidelity": self.fidelity, "seed": 0, "settle_steps": self.settle_steps}

    @property
    def tasks(self) -> list[int]:
        """The tasks of the run: task_ids, or task_id alone."""
        return list(self.task_ids) if self.task_ids is not None else [self.task_id]


@dataclass
class OpenVLAActorConfig:
    """The policy: which checkpoint, how it is loaded, which parts of it learn.

    Raises:
        ValueError: a value is out of range, or the action mode is none of the three that exist.
    """

    pretrained_checkpoint: str = "openvla-7b-oft-finetuned-libero-spatial"
    """Folder or hub id of an OpenVLA or OpenVLA-OFT checkpoint; bundled:tiny is the small policy that comes with the
    package; random:tiny and random:7b build untrained ones. The default names a release without its owner: give a
    folder of that name, or another checkpoint; presets do."""
    use_local: bool = True
    """Look for a local folder before the hub."""
    unnorm_key: str | None = None
    """Which action statistics of the checkpoint to use; None: the suite's."""

    use_multi_gpu: bool = False
    """Put the heads on a second GPU."""
    gpu_id: int = 0
    """GPU of the policy, if device is auto."""
    secondary_gpu_id: int = 1
    """GPU of the heads with use_multi_gpu."""

    freeze_vla_backbone: bool = False
    """Train the heads only; use_lora has no effect then."""
    use_lora: bool = True
    """Train LoRA adapters instead of the weights."""
    lora_rank: int = 32
    """Rank of the adapters."""
    lora_alpha: int = 16
    """Scale of the adapters, capped at min(rank, 16)."""
    lora_dropout: float = 0.0
    """Dropout inside the adapters."""
    lora_target_modules: str = "all-linear"
    """Which modules get an adapter."""
    load_in_4bit: bool = False
    """Quantise the frozen weights to 4 bits (bitsandbytes, needs a GPU)."""

    use_proprio: bool = True
    """Feed the robot's state, if the checkpoint has a projector for it."""
    proprio_dim: int = 8
    """Size of the robot's state."""
    num_images_in_input: int = 1
    """Cameras the policy looks through: 1 agentview, 2 with the wrist camera."""
    load_l1_action_head: bool = False
    """Load the L1 regression head."""
    freeze_l1_action_head: bool = True
    """Keep the L1 head as it is. PPO never trains it; finetune with objective=l1 does."""
    use_tokenized_actions: bool = True
    """Act through the action tokens' probabilities; PPO needs this."""
    use_l1_regression: bool = True
    """Deprecated, without effect: use_tokenized_actions and load_l1_action_head choose the mode."""
    finetuned_on_discrete_actions: bool = False
    """The maker of the checkpoint says that its action tokens were trained; no file of a checkpoint does."""
    force: bool = False
    """Train from a checkpoint all the same whose action tokens were never trained."""
    deterministic_eval: bool = True
    """Validate at eval_temperature; off: at rollout_temperature where eval_temperature is 0."""
    compile: bool = True
    """Compile the layers, fuse their weights and replay small batches as CUDA graphs, on a GPU; a CPU runs them as they
    are."""
    use_flash_attention: bool = True
    """Use flash-attention 2 if installed, else PyTorch's own attention."""

    def __post_init__(self) -> None:
        _positive(self, "lora_rank", "lora_alpha", "proprio_dim")
        _non_negative(self, "gpu_id", "secondary_gpu_id")
        _fraction(self, "lora_dropout")
        if self.lora_dropout == 1:
            raise ValueError("lora_dropout must be below 1, got 1: the adapters would never learn.")
        if self.num_images_in_input not in (1, 2):
            raise ValueError(
                "num_images_in_input must be 1 (agentview) or 2 (with the wrist camera), "
                f"got {self.num_images_in_input}."
            )
        if not self.use_tokenized_actions and not self.load_l1_action_head:
            raise ValueError(
                "use_tokenized_actions=False and load_l1_action_head=False leave no way to act: turn one of them on."
            )
        if self.use_multi_gpu and self.gpu_id == self.secondary_gpu_id:
            raise ValueError(
                f"use_multi_gpu needs two different GPUs, but gpu_id and secondary_gpu_id are both {self.gpu_id}."
            )

    def require_tokens_for_ppo(self) -> None:
        """Refuse a policy without action probabilities.

        Raises:
            ValueError: use_tokenized_actions is off.
        """
        if not self.use_tokenized_actions:
            raise ValueError(
                "PPO needs use_tokenized_actions=True: the L1 head is deterministic, so there is no probability to "
                "make larger. Keep the L1 head loaded for comparison (load_l1_action_head=True) and act by tokens."
            )


@dataclass
class TrainConfig:
    """One training run."""

    ppo: PPOConfig = field(default_factory=PPOConfig)
    env: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    actor: OpenVLAActorConfig = field(default_factory=OpenVLAActorConfig)
    run_dir: Path | None = None
    """Folder for everything the run writes; None: runs/SUITE-DATE-TIME. Must not exist yet, unless resumed."""
    resume: bool = False
    """Go on with the run in run_dir from its last checkpoint."""

    def __post_init__(self) -> None:
        if self.resume and self.run_dir is None:
            raise ValueError("resume needs run_dir: the folder of the run to go on with.")

    def save(self, path: Path) -> None:
        """Write as JSON, to be read again by `load`."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n")

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read what `save` wrote.

        Raises:
            ValueError: the file has a parameter that this version does not know.
        """
        values = json.loads(path.read_text())
        try:
            values["env"]["image_size"] = tuple(values["env"]["image_size"])
            return cls(
                ppo=PPOConfig(**values["ppo"]),
                env=EnvironmentConfig(**values["env"]),
                actor=OpenVLAActorConfig(**values["actor"]),
                run_dir=Path(values["run_dir"]) if values["run_dir"] else None,
                resume=values["resume"],
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} was not written by this version of torchrl-vla: {error}.") from error
