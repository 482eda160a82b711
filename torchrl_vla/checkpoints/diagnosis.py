"""Whether a checkpoint is what a job needs, and whether this machine can do the job."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

from torchrl_vla.checkpoints.finite import require_finite_files
from torchrl_vla.checkpoints.folder import CheckpointFolder
from torchrl_vla.checkpoints.inspection import CheckpointSummary, trained_mode
from torchrl_vla.checkpoints.memory_estimate import MemoryEstimate
from torchrl_vla.checkpoints.policy import require_cameras
from torchrl_vla.checkpoints.release_statistics import complete_statistics, release_of
from torchrl_vla.checkpoints.statistics import action_tokenizer
from torchrl_vla.config import EnvironmentConfig
from torchrl_vla.config.releases import OFT_CHECKPOINTS, TOKEN_CHECKPOINTS
from torchrl_vla.envs import get_suite
from torchrl_vla.envs.rendering import configure_rendering, renderer_name
from torchrl_vla.envs.tasks import SUITES
from torchrl_vla.modules import load_tokenizer
from torchrl_vla.modules.openvla.architecture import OpenVLAConfig
from torchrl_vla.modules.openvla.attention import resolve_attention
from torchrl_vla.modules.openvla.quantization import check_4bit
from torchrl_vla.modules.openvla.tokenizer import empty_token_id
from torchrl_vla.versions import NOT_A_PACKAGE, package_version

__all__ = ["Check", "Diagnosis", "check_checkpoint", "check_machine", "fits_memory"]

# Checks without which a checkpoint acts by nothing that it learned.
_NEEDED_TO_ACT = ("weights", "tokenizer", "statistics")
#: CUDA's context and fragmentation, on top of what is counted.
_OVERHEAD = 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what.
        status: ``ok``, ``note`` (worth knowing) or ``problem`` (the job cannot be done like this).
        message: what was found, and what to do about it.
    """

    name: str
    status: Literal["ok", "note", "problem"]
    message: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Args:
        checkpoint: what is in it.
        memory: what each phase needs, by its name.
        checks: of the checkpoint and the machine.
    """

    checkpoint: CheckpointSummary
    memory: dict[str, MemoryEstimate]
    checks: list[Check]

    @property
    def fits(self) -> bool:
        """Whether there is no problem."""
        return all(check.status != "problem" for check in self.checks)

    @property
    def can_seed_rl(self) -> bool:
        """Whether RL can start from the checkpoint, whatever this machine can do."""
        sound = all(check.status != "problem" for check in self.checks if check.name in _NEEDED_TO_ACT)
        return self.checkpoint.mode.has_trained_tokens and sound

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON has it; sizes are in bytes."""
        summary = self.checkpoint
        return {
            "fits": self.fits,
            "checkpoint": str(summary.checkpoint.path),
            "mode": summary.mode.name,
            "mode_reason": summary.mode.reason,
            "can_seed_rl": self.can_seed_rl,
            "parameters": sum(summary.parameters.values()),
            "parameters_by_part": summary.parameters,
            "dtypes": summary.dtypes,
            "tensors": summary.num_tensors,
            "shards": summary.num_shards,
            "bytes": summary.bytes,
            "statistics": sorted(summary.checkpoint.config.statistics),
            "steps": summary.steps,
            "lora_adapter": summary.adapter,
            "memory": {name: {**vars(need), "total": need.total} for name, need in self.memory.items()},
            "checks": [vars(check) for check in self.checks],
        }

    def __str__(self) -> str:
        summary = self.checkpoint
        dtypes = ", ".join(sorted(summary.dtypes))
        total = sum(summary.parameters.values())
        rows = [
            ("checkpoint", str(summary.checkpoint.path)),
            ("trained for", f"{summary.mode.name}: {summary.mode.reason}"),
            ("can seed RL", "yes" if self.can_seed_rl else "no"),
            ("parameters", f"{total:,} ({dtypes}, {summary.bytes / 1e9:.2f} GB on disk)"),
            *(("", f"{count:>15,} {part}") for part, count in summary.parameters.items()),
            ("shards", f"{summary.num_shards} with {summary.num_tensors} tensors"),
            ("heads", ", ".join(f"{kind} of step {step}" for kind, step in summary.steps.items()) or "none"),
            ("statistics", ", ".join(sorted(summary.checkpoint.config.statistics)) or "none"),
        ]
        if summary.adapter is not None:
            adapter = summary.adapter
            rows.append(
                ("lora_adapter", f"rank {adapter['r']}, alpha {adapter['lora_alpha']}, merged into the shards already")
            )
        for name, need in self.memory.items():
            parts = {part: size for part, size in vars(need).items() if size}
            shown = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in parts.items())
            rows.append((name, f"{need.total / 2**30:.2f} GiB: {shown}"))
        lines = [f"{name:<13} {text}" for name, text in rows]
        lines += ["", *(f"{check.status:<8} {check.name}: {check.message}" for check in self.checks)]
        return "\n".join(lines)


def check_checkpoint(
    summary: CheckpointSummary, *, purpose: Literal["train", "evaluate"], task_suite: str | None, num_images: int = 1
) -> list[Check]:
    """Compare a checkpoint with a job.

    Args:
        summary: what is in it.
        purpose: ``train`` (RL on its tokens) or ``evaluate``.
        task_suite: the suite of the job; None: any of LIBERO's.
        num_images: cameras to look through.
    """
    return [
        _check_mode(summary, purpose),
        _check_weights(summary.checkpoint),
        _check_tokenizer(summary.checkpoint),
        _check_cameras(summary, num_images),
        *_check_projector(summary.checkpoint),
        *_check_proprio_format(summary.checkpoint.config, purpose),
        _check_statistics(summary, task_suite),
    ]


def _check_weights(checkpoint: CheckpointFolder) -> Check:
    try:
        require_finite_files(checkpoint.shards, checkpoint.heads.values())
    except ValueError as error:
        return Check("weights", "problem", str(error))
    return Check("weights", "ok", "all of them are finite")


def _check_cameras(summary: CheckpointSummary, num_images: int) -> Check:
    config = summary.checkpoint.config
    try:
        require_cameras(config, num_images, summary.checkpoint.path)
    except ValueError as error:
        return Check("cameras", "problem", str(error))
    # What this package trained notes more than one camera, and how it was trained: then one is what it has.
    unknown = config.trained_for is None and config.num_images == 1
    if unknown and config.use_proprio and "action_head" in summary.steps and num_images == 1:
        text = (
            f"it does not say how many it was trained with. {OFT_CHECKPOINTS}, which have an L1 head and read the "
            "robot's state as it does, were trained with two: --num-images-in-input 2"
        )
        return Check("cameras", "note", text)
    return Check("cameras", "ok", str(num_images))


def _check_projector(checkpoint: CheckpointFolder) -> list[Check]:
    """Nothing, but for an OpenVLA-OFT that may have lost a file: no file of a release says that it needs one."""
    config = checkpoint.config
    known = any(isinstance(entry, dict) and "proprio" in entry for entry in config.statistics.values())
    if config.use_proprio or "action_head" not in checkpoint.heads or not known:
        return []
    text = (
        "it has an L1 head and statistics of the robot's state, and no proprio_projector--N_checkpoint.pt: if it was "
        f"trained with the state, as {OFT_CHECKPOINTS} were, copy that file too"
    )
    return [Check("proprio", "note", text)]


def _check_proprio_format(config: OpenVLAConfig, purpose: str) -> list[Check]:
    """Nothing, but for a policy that `train` has to be told of; `evaluate` shows the state as the policy notes it."""
    noted = config.proprio_format
    if purpose == "evaluate" or not config.use_proprio or noted in (None, EnvironmentConfig().proprio_format):
        return []
    text = f"it was trained with the robot's state as {noted}: pass --proprio-format {noted}"
    return [Check("proprio_format", "note", text)]


def _check_statistics(summary: CheckpointSummary, task_suite: str | None) -> Check:
    checkpoint = summary.checkpoint
    release = release_of(checkpoint.path)
    if release is not None:
        try:
            checkpoint = complete_statistics(checkpoint, release.suite)
        except ValueError as error:
            return Check("statistics", "problem", str(error))
    keys = sorted(checkpoint.config.statistics)
    libero = [suite for suite in SUITES if {suite, f"{suite}_no_noops"} & set(keys)]
    if not keys or (task_suite is None and not libero):
        found = f"there are none of LIBERO's, only {', '.join(keys)}" if keys else "there are none"
        text = (
            f"{found}, so actions have no units: put dataset_statistics.json of the release fine-tuned on the same "
            f"data, one of {OFT_CHECKPOINTS}, into a local copy (hf download OWNER/NAME --local-dir FOLDER) and name "
            "that folder, or name those that it was trained with (--unnorm-key)"
        )
        return Check("statistics", "problem", text)
    try:
        suites = libero if task_suite is None else [get_suite(task_suite).base or task_suite]
        for suite in suites:
            action_tokenizer(checkpoint.config, suite, source=checkpoint.path)
    except ValueError as error:
        return Check("statistics", "problem", str(error))
    text = f"it has those of {task_suite or ', '.join(libero)}"
    default = EnvironmentConfig().task_suite
    if task_suite is None and default not in libero:
        return Check("statistics", "note", f"{text}, not of {default}, the default: pass --task-suite {libero[0]}")
    return Check("statistics", "ok", text)


def _check_mode(summary: CheckpointSummary, purpose: str) -> Check:
    mode, alone = summary.mode, trained_mode(summary.checkpoint)
    if purpose == "evaluate" and mode.has_trained_tokens and not alone.has_trained_tokens:
        instead = "by its L1 head" if alone.name == "l1" else "by its tokens one after the other"
        text = (
            f"{mode.reason}, and the folder does not: `evaluate` would act {instead}; pass --action-mode tokens to it"
        )
        return Check("mode", "note", text)
    if mode.has_trained_tokens:
        return Check("mode", "ok", "its action tokens were trained to be decoded in parallel")
    if mode.name == "l1":
        if purpose == "evaluate":
            return Check("mode", "ok", "it acts by its L1 head")
        text = (
            "its action-token logits were never trained, so RL has nothing to start from; take a token checkpoint "
            f"({', '.join(TOKEN_CHECKPOINTS)}), or pass --finetuned-on-discrete-actions if its maker says they were"
        )
        return Check("mode", "problem", text)
    if purpose == "evaluate":
        return Check("mode", "ok", "it acts by its tokens, one after the other, one control step at a time")
    text = (
        "its action tokens were trained one after the other, and are decoded in parallel here: fine-tune it first "
        "(torchrl-vla finetune), or pass --finetuned-on-discrete-actions if it is an OpenVLA-OFT after all"
    )
    return Check("mode", "problem", text)


def _check_tokenizer(checkpoint: CheckpointFolder) -> Check:
    config = checkpoint.config
    try:
        token = empty_token_id(load_tokenizer(checkpoint.path))
    except ValueError as error:
        return Check("tokenizer", "problem", str(error))
    if token != config.empty_token_id:
        text = (
            f"prompts end with token {token}, the model expects {config.empty_token_id}: take the release's tokenizer"
        )
        return Check("tokenizer", "problem", text)
    return Check("tokenizer", "ok", f"prompts end with token {token}")


def check_machine(
    device: torch.device, dtype: torch.dtype, needs: dict[str, MemoryEstimate], *, load_in_4bit: bool
) -> list[Check]:
    """Compare this machine with a job.

    Args:
        device: of the policy.
        dtype: of its weights.
        needs: memory of each phase, by its name.
        load_in_4bit: whether the weights are quantised.
    """
    return [
        _check_memory(device, needs),
        _check_dtype(device, dtype),
        _check_attention(device, dtype),
        *([_check_4bit(device)] if load_in_4bit else []),
        _check_renderer(),
        _check_versions(),
    ]


def fits_memory(device: torch.device, need: MemoryEstimate) -> bool:
    """Whether a device has the memory."""
    return _with_overhead(device, need) <= _memory(device)[0]


def _with_overhead(device: torch.device, need: MemoryEstimate) -> int:
    return need.total + (_OVERHEAD if device.type == "cuda" else 0)


def _memory(device: torch.device) -> tuple[int, str]:
    """Bytes that a device has, and its name."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, f"{properties.name} ({device})"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine (no GPU is used)"


def _check_memory(device: torch.device, needs: dict[str, MemoryEstimate]) -> Check:
    have, name = _memory(device)
    phase, need = max(needs.items(), key=lambda item: item[1].total)
    text = f"{phase} needs {_with_overhead(device, need) / 2**30:.1f} GiB, {name} has {have / 2**30:.1f}"
    if fits_memory(device, need):
        return Check("memory", "ok", text)
    advice = "lower --num-envs, halve float32 weights (`torchrl-vla export --dtype bfloat16`)"
    if "training" in needs:
        advice = (
            "lower --batch-size or --num-envs, use adapters (--use-lora), --gradient-checkpointing 1 or --load-in-4bit"
        )
    return Check("memory", "problem", f"{text}: {advice}, or take a larger machine")


def _check_dtype(device: torch.device, dtype: torch.dtype) -> Check:
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return Check(
            "dtype", "problem", f"{torch.cuda.get_device_name(device)} has no bfloat16: take an Ampere or newer"
        )
    if device.type == "cpu" and dtype != torch.float32:
        return Check("dtype", "note", f"{name} is slow on a CPU; weights are loaded there in float32 unless asked for")
    return Check("dtype", "ok", name)


def _check_attention(device: torch.device, dtype: torch.dtype) -> Check:
    return Check("attention", "ok", resolve_attention(None, device.type, dtype))


def _check_4bit(device: torch.device) -> Check:
    try:
        check_4bit(device)
    except ValueError as error:
        return Check("4-bit", "problem", str(error))
    return Check("4-bit", "ok", f"bitsandbytes {importlib.metadata.version('bitsandbytes')}")


def _check_renderer() -> Check:
    try:
        backend = configure_rendering()
        return Check("renderer", "ok", f"{backend}: {renderer_name(backend)}")
    except (RuntimeError, ValueError) as error:
        return Check("renderer", "problem", str(error))


def _check_versions() -> Check:
    """Return this package's own requirements, MuJoCo's exact version among them, against what is installed."""
    if package_version("torchrl-vla") == NOT_A_PACKAGE:
        text = (
            f"not checked: torchrl-vla is {NOT_A_PACKAGE}, so that nothing says which it needs: run `pip install -e .` "
            "in its source tree"
        )
        return Check("versions", "note", text)
    found, wrong = {}, []
    for line in importlib.metadata.requires("torchrl-vla") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = package_version(requirement.name)
        if version == NOT_A_PACKAGE:
            wrong.append(f"{requirement.name} is not installed")
            continue
        found[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, wanted is {requirement.specifier}")
    if wrong:
        return Check("versions", "problem", f"{'; '.join(wrong)}: install this package again with pip")
    shown = ("torch", "torchrl", "tensordict", "transformers", "peft", "mujoco")
    return Check("versions", "ok", ", ".join(f"{name} {found[name]}" for name in shown))
