"""The policy that supervised fine-tuning starts from, which parts of it learn, and how it is written at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchrl_vla.checkpoints.folder import open_checkpoint
from torchrl_vla.checkpoints.inspection import require_trained_tokens
from torchrl_vla.checkpoints.locations import RANDOM, find_policy
from torchrl_vla.checkpoints.openvla_format import load_openvla
from torchrl_vla.checkpoints.policy import (
    Policy,
    build_policy,
    read_image_settings,
    require_cameras,
    save_policy,
)
from torchrl_vla.checkpoints.trainable import weights_dtype
from torchrl_vla.config import FinetuneConfig
from torchrl_vla.datasets import DemonstrationMixture
from torchrl_vla.errors import UserError
from torchrl_vla.modules import ActionTokenizer, OpenVLA, OpenVLAConfig, OpenVLAProcessor, load_tokenizer, make_actor
from torchrl_vla.modules.heads import L1ActionHead
from torchrl_vla.modules.openvla import add_lora, freeze_backbone

__all__ = ["load_student", "save_student"]


def load_student(config: FinetuneConfig, data: DemonstrationMixture, device: torch.device) -> Policy:
    """Return the policy to train, normalising by the data's statistics, its trainable parameters chosen.

    Args:
        config: says where it comes from and what of it learns.
        data: the demonstrations.
        device: where it is put.

    Raises:
        ValueError: the checkpoint cannot be had, its action tokens were never trained, or it has another action
            dimension than the data.
    """
    settings: dict[str, Any] = {}
    choose_dtype = partial(
        weights_dtype,
        device=device,
        trainable=True,
        use_lora=config.use_lora,
        freeze_vla_backbone=config.freeze_vla_backbone,
    )
    if config.pretrained_checkpoint.startswith(RANDOM):
        name = config.pretrained_checkpoint.removeprefix(RANDOM)
        fresh = build_policy(name, device=device, dtype=choose_dtype(OpenVLAConfig.preset(name)))
        model, tokenizer = fresh.model, fresh.processor.tokenizer
        settings = {"backend": fresh.processor.images.backend}
    else:
        checkpoint = open_checkpoint(find_policy(config.pretrained_checkpoint))
        if config.objective == "tokens":
            require_trained_tokens(
                checkpoint,
                finetuned_on_discrete_actions=config.finetuned_on_discrete_actions,
                advice="Base openvla/openvla-7b can be fine-tuned too, and --objective l1 fine-tunes the head instead.",
            )
        require_cameras(checkpoint.config, config.num_images_in_input, checkpoint.path)
        model = load_openvla(checkpoint, dtype=choose_dtype(checkpoint.config), device=device)
        tokenizer = load_tokenizer(checkpoint.path)
        settings = read_image_settings(checkpoint.path)
    if data.action_dim != model.config.action_dim:
        raise UserError(
            f"{data.folders}: actions have {data.action_dim} numbers, {config.pretrained_checkpoint} gives "
            f"{model.config.action_dim}: fine-tune a policy of that action dimension."
        )
    model.config = replace(
        model.config,
        num_images=config.num_images_in_input,
        proprio_format="axis_angle" if model.config.use_proprio else None,  # as demonstrations are recorded
    )
    if config.objective == "l1" and model.action_head is None:
        model.action_head = _new_l1_head(model, config)
    _choose_parameters(model, config)
    model.config = replace(model.config, trained_for=config.objective)
    # The first suite's statistics stand for all in this object; `save_student` writes those of every suite.
    suite, statistics = next(iter(data.statistics.items()))
    actions = ActionTokenizer(
        statistics, n_bins=model.config.n_action_bins, vocab_size=model.config.tokenizer_vocab_size
    )
    processor = OpenVLAProcessor(tokenizer, actions, image_size=model.config.image_size, **settings)
    return Policy(model, processor, make_actor(model, processor).to(device), suite)


def _new_l1_head(model: OpenVLA, config: FinetuneConfig) -> L1ActionHead:
    if config.freeze_l1_action_head:
        raise UserError(
            f"{config.pretrained_checkpoint} has no L1 head to keep as it is: leave out freeze_l1_action_head, and a "
            "new head is trained."
        )
    return L1ActionHead(model.config.hidden_size, model.config.action_dim).to(model.device)


def _choose_parameters(model: OpenVLA, config: FinetuneConfig) -> None:
    if config.use_lora:
        add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout)
        if model.proprio_projector is not None:
            model.proprio_projector.requires_grad_(True)
    elif config.freeze_vla_backbone:
        freeze_backbone(model)
    if model.action_head is not None:
        model.action_head.requires_grad_(config.objective == "l1" and not config.freeze_l1_action_head)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(config.gradient_checkpointing)


def save_student(policy: Policy, folder: Path, statistics: Mapping[str, Any]) -> int:
    """Write the policy's folder: weights in bf16 with adapters merged, tokenizer, and the data's full statistics.

    Args:
        policy: the policy.
        folder: where to write; an older policy there is replaced.
        statistics: of the data, by suite.

    Returns:
        Size of the folder in bytes.
    """
    policy.model.config = replace(policy.model.config, torch_dtype="bfloat16")
    # The tokenizer knows the percentiles alone; upstream's format has more.
    save_policy(policy, folder, statistics=statistics)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
