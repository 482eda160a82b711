"""A policy with all that belongs to it: built, loaded and saved as one folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from torchrl_vla.checkpoints.companions import save_companions
from torchrl_vla.checkpoints.folder import CheckpointFolder, open_checkpoint
from torchrl_vla.checkpoints.inspection import TrainedMode, trained_mode
from torchrl_vla.checkpoints.integrity import write_checksums
from torchrl_vla.checkpoints.locations import RANDOM, find_policy
from torchrl_vla.checkpoints.openvla_format import load_openvla, save_openvla
from torchrl_vla.checkpoints.release_statistics import complete_statistics
from torchrl_vla.checkpoints.statistics import action_tokenizer, add_statistics, write_statistics
from torchrl_vla.checkpoints.trainable import check_tokens, prepare_for_ppo, weights_dtype
from torchrl_vla.config import OpenVLAActorConfig
from torchrl_vla.envs.tasks import get_suite
from torchrl_vla.errors import UserError
from torchrl_vla.files import read_json, whole_folder, write_json
from torchrl_vla.modules import (
    ActionTokenizer,
    OpenVLA,
    OpenVLAActor,
    OpenVLAAutoregressiveActor,
    OpenVLAConfig,
    OpenVLAL1Actor,
    OpenVLAProcessor,
    build_tokenizer,
    load_tokenizer,
    make_actor,
    make_autoregressive_actor,
    make_l1_actor,
)
from torchrl_vla.modules.openvla.lora import without_adapters
from torchrl_vla.modules.openvla.tokenizer import empty_token_id

__all__ = [
    "GRAPH_BATCH_SIZE",
    "Policy",
    "build_policy",
    "load_policy",
    "policy_mode",
    "read_image_settings",
    "require_cameras",
    "require_proprio_format",
    "save_policy",
]

#: Image settings of a policy folder; released checkpoints have none.
PROCESSOR_FILE = "processor.json"
#: As many environments as a 7B model's rollout has at most: to launch 8 decisions one by one takes longer than to
#: compute them, and replaying larger batches costs nothing.
GRAPH_BATCH_SIZE = 32
#: Tokens: few lengths for all tasks, and little padding.
_PROMPT_MULTIPLE = 16
#: Suites that the small tokenizer knows the words of; their LIBERO-PRO variants use few others.
_VOCABULARY_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")


@dataclass
class Policy:
    """A network, what makes its inputs, and the TorchRL actor over both.

    Args:
        model: the network.
        processor: makes its inputs; holds the text tokenizer and the action tokenizer with its statistics.
        actor: the TorchRL policy: by tokens, in parallel or one after the other, or by the L1 head.
        statistics_key: name of the action statistics.
    """

    model: OpenVLA
    processor: OpenVLAProcessor
    actor: OpenVLAActor | OpenVLAAutoregressiveActor | OpenVLAL1Actor
    statistics_key: str

    def share_prompt_length(self, instructions: Iterable[str]) -> None:
        """Pad the prompts of several tasks, so that a compiled network does not meet every length anew.

        Prompts of one length stay as they are: attention without a mask is faster. So does everything on a CPU.

        Args:
            instructions: of all tasks that are to come.
        """
        ids, mask = self.processor.encode_instructions(list(instructions))
        if mask is not None and self.model.accelerated:
            self.processor.prompt_multiple = _PROMPT_MULTIPLE

    def reference_context(self) -> AbstractContextManager[Any]:
        """Return a context in which the policy is the one it was before its adapters learned."""
        return without_adapters(self.model)


def build_policy(
    name: str,
    *,
    statistics_key: str = "libero_spatial",
    temperature: float = 1.6,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    use_l1_head: bool = False,
    num_images: int = 1,
    use_proprio: bool = True,
    instructions: Mapping[int, str] | None = None,
) -> Policy:
    """Make an untrained policy.

    Args:
        name: ``tiny`` or ``7b``.
        statistics_key: name that its action statistics (none: actions are taken as they are) are saved under.
        temperature: sampling temperature.
        device: where to make it.
        dtype: of its weights; None for :func:`weights_dtype`'s.
        use_l1_head: with an L1 head too.
        num_images: cameras it looks through.
        use_proprio: read the robot's state, if the preset does.
        instructions: as for :func:`~torchrl_vla.modules.make_actor`.

    Raises:
        ValueError: there is no such preset.
    """
    config, device = replace(OpenVLAConfig.preset(name), num_images=num_images), torch.device(device)
    config = replace(config, use_proprio=config.use_proprio and use_proprio)
    # Words of every suite, so that a policy can go on to another one.
    words = [task.instruction for suite in _VOCABULARY_SUITES for task in get_suite(suite).tasks]
    tokenizer = build_tokenizer(words, vocab_size=config.tokenizer_vocab_size, n_bins=config.n_action_bins)
    config = replace(config, empty_token_id=empty_token_id(tokenizer))
    # Made where it will be and in its own dtype, as a checkpoint is loaded: 7B in float32 would not fit a 24 GB card.
    with torch.device("meta"):
        model = OpenVLA(config, use_l1_head=use_l1_head)
    model.to(dtype or weights_dtype(config, device)).to_empty(device=device).initialize()
    actions = ActionTokenizer(n_bins=config.n_action_bins, vocab_size=config.tokenizer_vocab_size)
    return _assemble(
        model,
        tokenizer,
        actions,
        {"backend": "fast"},
        statistics_key,
        temperature=temperature,
        device=torch.device(device),
        instructions=instructions,
    )


def require_cameras(config: OpenVLAConfig, num_images: int, folder: Path) -> None:
    """Refuse to look through fewer cameras than a policy was trained with.

    No file of a released checkpoint says how many these were; this package notes it.

    Args:
        config: of the policy.
        num_images: cameras to look through.
        folder: of the policy, for the message.

    Raises:
        ValueError: they are fewer.
    """
    if config.num_images > num_images:
        raise UserError(
            f"num_images_in_input is {num_images}, but {folder} was trained with {config.num_images} cameras: use "
            f"--num-images-in-input {config.num_images}."
        )


def require_proprio_format(config: OpenVLAConfig, proprio_format: str, folder: Path) -> None:
    """Refuse to show a policy the robot's state written otherwise than it was trained with.

    No file of a released checkpoint says how that was; this package notes it.

    Args:
        config: of the policy.
        proprio_format: how the state is written.
        folder: of the policy, for the message.

    Raises:
        ValueError: the policy was trained with another format.
    """
    if config.use_proprio and config.proprio_format not in (None, proprio_format):
        raise UserError(
            f"proprio_format is {proprio_format}, but {folder} was trained with {config.proprio_format}: use "
            f"--proprio-format {config.proprio_format}."
        )


def policy_mode(name: str) -> TrainedMode:
    """For which way of acting a policy was trained.

    Args:
        name: as in :class:`OpenVLAActorConfig`.

    Raises:
        ValueError: it cannot be had.
    """
    if name.startswith(RANDOM):
        return TrainedMode("tokens", "it is untrained")
    return trained_mode(open_checkpoint(find_policy(name)))


def load_policy(
    checkpoint: str | Path | CheckpointFolder | OpenVLAActorConfig,
    *,
    task_suite: str = "libero_spatial",
    temperature: float = 1.6,
    device: torch.device | str = "cpu",
    head_device: torch.device | None = None,
    dtype: torch.dtype | Literal["stored"] | None = None,
    trainable: bool = True,
    autoregressive: bool = False,
    read_task_ids: bool | Sequence[int] = False,
    proprio_format: Literal["axis_angle", "quaternion"] | None = None,
    **options: Any,
) -> Policy:
    """Load a policy, and prepare what of it learns.

    Args:
        checkpoint: ``bundled:tiny``, ``random:tiny``, ``random:7b``, a folder, opened already or not, or a hub id; or a
            configuration that names one of them.
        task_suite: the suite whose statistics to use if `unnorm_key` names none.
        temperature: sampling temperature.
        device: where to load it.
        head_device: where to put the L1 head; None for `device`.
        dtype: as for :func:`~torchrl_vla.checkpoints.openvla_format.load_openvla`; None for :func:`weights_dtype`'s.
        trainable: add adapters or freeze parts as configured; False loads it to be used as it is.
        autoregressive: decode one token after the other and one control step at a time, as base OpenVLA does. Such a
            policy acts; it cannot be trained so.
        read_task_ids: read which task of the suite it is from ``task_id``, not from ``language_instruction``: one of
            these tasks, or any for True. Prompts are padded to the longest of them.
        proprio_format: how the robot's state will be written, noted when the policy is saved; None: as it notes itself.
        options: fields of :class:`~torchrl_vla.config.OpenVLAActorConfig`, such as ``use_lora`` and ``lora_rank``, if
            `checkpoint` is not a configuration.

    Raises:
        ValueError: the checkpoint is not available, does not fit the options or its decoding, or is to be trained and
            has no trained tokens.

    Examples:
        >>> policy = load_policy("bundled:tiny", task_suite="libero_spatial", lora_rank=4)
        >>> sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
        204000
    """
    if isinstance(checkpoint, OpenVLAActorConfig):
        if options:
            raise UserError(f"{', '.join(options)}: the configuration of the policy has these options already.")
        actor = checkpoint
    else:
        name = checkpoint.path if isinstance(checkpoint, CheckpointFolder) else checkpoint
        actor = OpenVLAActorConfig(pretrained_checkpoint=str(name), **options)
    if autoregressive and (trainable or not actor.use_tokenized_actions):
        raise UserError(
            "autoregressive decoding is for acting by tokens: load the policy with trainable=False and "
            "use_tokenized_actions=True."
        )
    device = torch.device(device)
    choose_dtype = partial(
        weights_dtype,
        device=device,
        trainable=trainable,
        use_lora=actor.use_lora,
        freeze_vla_backbone=actor.freeze_vla_backbone,
    )
    tasks = dict(enumerate(get_suite(task_suite).tasks)) if read_task_ids else {}
    if isinstance(read_task_ids, Sequence):
        tasks = {task_id: tasks[task_id] for task_id in read_task_ids}
    instructions = {task_id: task.instruction for task_id, task in tasks.items()} or None
    if actor.pretrained_checkpoint.startswith(RANDOM):
        name = actor.pretrained_checkpoint.removeprefix(RANDOM)
        if actor.load_in_4bit:
            raise UserError(
                f"load_in_4bit reads a checkpoint in 4 bits, and {actor.pretrained_checkpoint} has none: leave it out, "
                "or save the policy and name its folder."
            )
        policy = build_policy(
            name,
            statistics_key=task_suite,
            temperature=temperature,
            device=device,
            dtype=None if dtype == "stored" else dtype or choose_dtype(OpenVLAConfig.preset(name)),
            use_l1_head=actor.load_l1_action_head,
            num_images=actor.num_images_in_input,
            use_proprio=actor.use_proprio,
            instructions=instructions,
        )
    else:
        opened = checkpoint
        if not isinstance(opened, CheckpointFolder):
            opened = open_checkpoint(find_policy(actor.pretrained_checkpoint, use_local=actor.use_local))
        folder, config = opened.path, opened.config
        # Small files first: what does not fit is said before gigabytes are read.
        if trainable and not actor.force:
            check_tokens(opened, actor)
        if config.use_proprio and not actor.use_proprio:
            raise UserError(
                f"use_proprio is off, but {folder} was trained with the robot's state: leave it on, or choose a "
                "checkpoint without a proprio projector."
            )
        if config.use_proprio and actor.proprio_dim != config.proprio_dim:
            raise UserError(
                f"proprio_dim is {actor.proprio_dim}, but {folder} reads states of {config.proprio_dim} numbers: use "
                f"--proprio-dim {config.proprio_dim}."
            )
        require_cameras(config, actor.num_images_in_input, folder)
        if proprio_format is not None:
            require_proprio_format(config, proprio_format, folder)
        key = actor.unnorm_key or get_suite(task_suite).base or task_suite
        opened = complete_statistics(opened, key)
        actions = action_tokenizer(opened.config, key, source=folder)
        tokenizer = load_tokenizer(folder)
        settings = read_image_settings(folder)
        model = load_openvla(
            opened,
            dtype=dtype or choose_dtype(config),
            device=device,
            load_in_4bit=actor.load_in_4bit,
            load_l1_action_head=actor.load_l1_action_head or False,
            attn_implementation=None if actor.use_flash_attention else "sdpa",
        )
        model.config = replace(model.config, num_images=actor.num_images_in_input)
        policy = _assemble(
            model,
            tokenizer,
            actions,
            settings,
            key,
            temperature=temperature,
            device=device,
            instructions=instructions,
        )
    if proprio_format is not None and policy.model.config.use_proprio:
        policy.model.config = replace(policy.model.config, proprio_format=proprio_format)
    if head_device is not None and policy.model.action_head is not None:
        policy.model.action_head.to(head_device)
    if autoregressive:
        # No file of a released checkpoint says how many control steps it decides at once.
        policy.model.config = replace(policy.model.config, chunk_size=1)
        policy.actor = make_autoregressive_actor(
            policy.model, policy.processor, temperature=temperature, instructions=instructions
        )
    elif not actor.use_tokenized_actions:
        policy.actor = make_l1_actor(policy.model, policy.processor, instructions=instructions)
    if trainable:
        prepare_for_ppo(policy.model, actor)
        policy.actor.eval()  # adapters too: PPO compares probabilities of one network
    else:
        policy.model.requires_grad_(False)
    if actor.compile and device.type == "cuda":
        policy.model.accelerate(graph_batch_size=GRAPH_BATCH_SIZE)
    return policy


def read_image_settings(folder: Path) -> dict[str, Any]:
    """Options of a checkpoint's image pipeline.

    Released checkpoints say nothing: they were trained and judged with the exact pipeline and the centre crop.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: the file is damaged, or has an option that there is not.
    """
    path = folder / PROCESSOR_FILE
    settings = read_json(path) if path.is_file() else {}
    unknown = sorted(set(settings) - {"backend", "center_crop"})
    if unknown:
        raise UserError(f"{path} has {', '.join(unknown)}; it may have backend (exact or fast) and center_crop.")
    return settings


def save_policy(policy: Policy, folder: Path, *, statistics: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Write the policy in upstream's format, adapters merged, so that `load_policy` and upstream's tools read it.

    Checksums go with it: whoever opens it is told of damage.

    Args:
        policy: the policy; it is not changed.
        folder: replaced as a whole once everything is written.
        statistics: by data set, to be written; None: those it was loaded with, and the percentiles that it acts by.
        options: of :func:`~torchrl_vla.checkpoints.openvla_format.save_openvla`.
    """
    config, processor = policy.model.config, policy.processor
    if statistics is None:
        statistics = add_statistics(config.statistics, policy.statistics_key, processor.action_tokenizer)
    with whole_folder(folder) as partial:
        save_openvla(policy.model, partial, **options)
        write_statistics(partial, statistics)
        settings = {"backend": processor.images.backend, "center_crop": processor.images.center_crop}
        write_json(partial / PROCESSOR_FILE, settings)
        save_companions(processor.tokenizer, config, partial)
        write_checksums(partial)


def _assemble(
    model: OpenVLA,
    tokenizer: PreTrainedTokenizerBase,
    actions: ActionTokenizer,
    settings: dict[str, Any],
    key: str,
    *,
    temperature: float,
    device: torch.device,
    instructions: Mapping[int, str] | None,
) -> Policy:
    processor = OpenVLAProcessor(tokenizer, actions, image_size=model.config.image_size, **settings)
    actor = make_actor(model, processor, actions, temperature=temperature, instructions=instructions).to(device)
    return Policy(model, processor, actor.eval(), key)
