"""What of a policy PPO trains, in which dtype, and whether a checkpoint can be trained so."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from torchrl_vla.checkpoints.folder import CheckpointFolder
from torchrl_vla.checkpoints.inspection import require_trained_tokens
from torchrl_vla.config import OpenVLAActorConfig
from torchrl_vla.errors import UserError
from torchrl_vla.modules import OpenVLA, OpenVLAConfig
from torchrl_vla.modules.openvla.lora import add_lora, freeze_backbone

__all__ = ["check_tokens", "prepare_for_ppo", "weights_dtype"]

logger = logging.getLogger(__name__)


def weights_dtype(
    config: OpenVLAConfig,
    device: torch.device,
    *,
    trainable: bool = False,
    use_lora: bool = False,
    freeze_vla_backbone: bool = False,
) -> torch.dtype:
    """Return the dtype of a policy's weights where none is asked for: as they are stored, and float32 on a CPU.

    Weights that learn themselves are float32 everywhere: steps of usual learning rates are smaller than what bfloat16
    can add to a weight.

    Args:
        config: of the checkpoint.
        device: where the weights are to be.
        trainable: whether something learns.
        use_lora: adapters do.
        freeze_vla_backbone: heads do.

    Examples:
        >>> weights_dtype(OpenVLAConfig.seven_b(), torch.device("cuda"), trainable=True, use_lora=True)
        torch.bfloat16
    """
    learn = trainable and not (use_lora or freeze_vla_backbone)
    return torch.float32 if learn or device.type == "cpu" else getattr(torch, config.torch_dtype)


def check_tokens(checkpoint: CheckpointFolder, actor: OpenVLAActorConfig) -> None:
    """Refuse a checkpoint whose action tokens were never trained, and say so where they were trained one by one.

    Args:
        checkpoint: the folder.
        actor: what the user says of it.

    Raises:
        ValueError: its tokens were never trained.
    """
    mode = require_trained_tokens(
        checkpoint,
        finetuned_on_discrete_actions=actor.finetuned_on_discrete_actions,
        advice="--force starts from it all the same.",
    )
    if not mode.has_trained_tokens:
        logger.warning(
            "%s is taken for base OpenVLA (%s): its tokens were trained one after the other, and are decoded in "
            "parallel here. `torchrl-vla finetune` teaches it that.",
            checkpoint.path,
            mode.reason,
        )


def prepare_for_ppo(model: OpenVLA, actor: OpenVLAActorConfig) -> None:
    """Add adapters or freeze parts, as configured, and note in the model's configuration that its tokens learn.

    Args:
        model: the network; it is changed.
        actor: says what of it learns.

    Raises:
        ValueError: nothing is left that could learn.
    """
    if actor.freeze_vla_backbone:
        freeze_backbone(model)
    elif actor.use_lora:
        targets: str | list[str] = actor.lora_target_modules
        if targets != "all-linear":
            targets = actor.lora_target_modules.split(",")
        if actor.lora_dropout:
            logger.warning(
                "lora_dropout=%g is for `torchrl-vla finetune`: PPO compares probabilities of one network, without it.",
                actor.lora_dropout,
            )
        add_lora(
            model, rank=actor.lora_rank, alpha=actor.lora_alpha, dropout=actor.lora_dropout, target_modules=targets
        )
    else:
        # What is saved is what learned: bfloat16 would round most of a short run's steps away.
        model.config = replace(model.config, torch_dtype="float32")
    model.config = replace(model.config, trained_for="tokens")
    if model.action_head is not None:
        logger.warning("The L1 head is loaded for comparison: PPO acts through the tokens and leaves it as it is.")
        model.action_head.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "freeze_vla_backbone leaves nothing that PPO could train: this checkpoint has no proprio projector. Leave "
            "it out, and adapters (use_lora) or all weights learn."
        )
