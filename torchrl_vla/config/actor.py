"""Which policy a run starts from, how it is loaded, and which parts of it learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from torchrl_vla.config.validation import check_fields, fraction, non_negative, positive, warn_without_effect
from torchrl_vla.errors import UserError

__all__ = ["OpenVLAActorConfig"]


@dataclass
class OpenVLAActorConfig:
    """The policy: which checkpoint, how it is loaded, which parts of it learn.

    Raises:
        ValueError: a value is out of range, or the action mode is none of the three that exist.
    """

    LARGEST: ClassVar[Mapping[str, int]] = {
        "lora_rank": 65_536,
        "lora_alpha": 1_000_000,
        "proprio_dim": 65_536,
        "gpu_id": 1024,
        "secondary_gpu_id": 1024,
    }

    pretrained_checkpoint: Annotated[str, tyro.conf.arg(aliases=["--checkpoint"])] = (
        "openvla-7b-oft-finetuned-libero-spatial"
    )
    """Folder or hub id of an OpenVLA or OpenVLA-OFT checkpoint; bundled:tiny and bundled:tiny-spatial are small
    policies that come with the package, of four suites and of libero_spatial; random:tiny and random:7b build
    untrained ones. The default is a release that acts by its L1 head: for RL name one with trained tokens, as the
    presets do."""
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
    """Quantize the frozen weights to 4 bits (bitsandbytes, needs a GPU)."""

    use_proprio: bool = True
    """Feed the robot's state, if the checkpoint has a projector for it."""
    proprio_dim: int = 8
    """Size of the robot's state."""
    num_images_in_input: int = 1
    """Cameras the policy looks through: 1 agentview, 2 with the wrist camera."""
    load_l1_action_head: bool = False
    """Load the L1 regression head."""
    freeze_l1_action_head: bool = True
    """Without effect: PPO never trains the L1 head; finetune with objective=l1 does."""
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
        check_fields(self)
        positive(self, "lora_rank", "lora_alpha", "proprio_dim")
        non_negative(self, "gpu_id", "secondary_gpu_id")
        fraction(self, "lora_dropout")
        if self.lora_dropout == 1:
            raise UserError("lora_dropout must be below 1, got 1: the adapters would never learn.")
        if self.num_images_in_input not in (1, 2):
            raise UserError(
                "num_images_in_input must be 1 (agentview) or 2 (with the wrist camera), "
                f"got {self.num_images_in_input}."
            )
        if not self.use_tokenized_actions and not self.load_l1_action_head:
            raise UserError(
                "use_tokenized_actions=False and load_l1_action_head=False leave no way to act: turn one of them on."
            )
        if self.use_multi_gpu and self.gpu_id == self.secondary_gpu_id:
            raise UserError(
                f"use_multi_gpu needs two different GPUs, but gpu_id and secondary_gpu_id are both {self.gpu_id}."
            )
        warn_without_effect(
            self,
            {
                "use_l1_regression": "use_tokenized_actions and load_l1_action_head choose how the policy acts",
                "freeze_l1_action_head": "PPO never trains the L1 head; `finetune --objective l1` does",
            },
        )

    def require_tokens_for_ppo(self) -> None:
        """Refuse a policy without action probabilities.

        Raises:
            ValueError: use_tokenized_actions is off.
        """
        if not self.use_tokenized_actions:
            raise UserError(
                "PPO needs use_tokenized_actions=True: the L1 head is deterministic, so there is no probability to "
                "make larger. Keep the L1 head loaded for comparison (load_l1_action_head=True) and act by tokens."
            )
