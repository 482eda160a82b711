"""`torchrl-vla doctor`: what is in a checkpoint, and whether this machine can do the job."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from torchrl_vla.errors import UserError

__all__ = ["DoctorArguments", "main"]

#: Exit codes.
FITS, PROBLEMS, UNREADABLE = 0, 1, 2


@dataclass
class DoctorArguments:
    """Say what is in a checkpoint and whether this machine can train or evaluate it.

    Each weight is read once, to see that it is finite; none is kept.

    Exit code 0: it fits; 1: there are problems, each with what to do about it; 2: the checkpoint cannot be had or read.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a checkpoint, folder of a run, or bundled:tiny."""
    purpose: Literal["train", "evaluate"] = "train"
    """train: RL on its action tokens; evaluate: acting alone."""
    task_suite: str | None = None
    """Suite to look for in the action statistics; None: any of LIBERO's will do."""
    num_envs: int = 8
    """Decisions at a time in a rollout."""
    batch_size: int = 1
    """Decisions per forward and backward pass."""
    num_images_in_input: int = 1
    """Cameras: 1 agentview, 2 with the wrist camera."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto: the checkpoint's on a GPU, float32 on the CPU and where the weights themselves learn,
    as loading does."""
    load_in_4bit: bool = False
    """Quantise the frozen weights to 4 bits, as `train` can; `evaluate` cannot."""
    use_lora: bool = True
    """Train LoRA adapters instead of the weights."""
    lora_rank: int = 32
    """Rank of the adapters."""
    freeze_vla_backbone: bool = False
    """Train the heads only."""
    gradient_checkpointing: float | Literal["auto"] = "auto"
    """Share of the layers, 0 to 1, that are computed again in the backward pass to save memory; auto: none if the
    memory allows it, else all."""
    load_l1_action_head: bool = False
    """Load the L1 regression head; evaluating an L1 checkpoint does so anyway."""
    finetuned_on_discrete_actions: bool = False
    """The maker of the checkpoint says that its action tokens were trained. `evaluate` is told so by --action-mode
    tokens."""
    device: str = "auto"
    """Device of the policy: auto takes the GPU if there is one."""
    json: Path | None = None
    """Write the findings to this file too."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "batch_size", "num_images_in_input", "lora_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.gradient_checkpointing != "auto" and not 0 <= self.gradient_checkpointing <= 1:
            raise UserError(f"gradient_checkpointing must be auto or from 0 to 1, got {self.gradient_checkpointing}.")
        if self.load_in_4bit and self.purpose == "evaluate":
            raise UserError(
                "load_in_4bit is for --purpose train: `evaluate` loads the weights as they are, so leave out "
                "--load-in-4bit."
            )


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.

    Raises:
        SystemExit: always, with the exit code.
    """
    options = tyro.cli(DoctorArguments, prog="torchrl-vla doctor", args=arguments)
    import torch

    from torchrl_vla.checkpoints.diagnosis import Diagnosis, check_checkpoint, check_machine, fits_memory
    from torchrl_vla.checkpoints.folder import open_checkpoint
    from torchrl_vla.checkpoints.inspection import inspect_checkpoint
    from torchrl_vla.checkpoints.locations import find_policy
    from torchrl_vla.checkpoints.memory_estimate import estimate_memory
    from torchrl_vla.checkpoints.trainable import weights_dtype
    from torchrl_vla.files import check_output_file, write_json
    from torchrl_vla.training.devices import choose_device

    try:
        if options.json is not None:
            check_output_file(options.json, "--json")
        device = choose_device(options.device)
        summary = inspect_checkpoint(
            open_checkpoint(find_policy(options.checkpoint)),
            finetuned_on_discrete_actions=options.finetuned_on_discrete_actions,
        )
    except ValueError as error:
        print(f"torchrl-vla doctor: {error}", file=sys.stderr)
        sys.exit(UNREADABLE)
    config, trainable = summary.checkpoint.config, options.purpose == "train"
    learning: dict[str, Any] = dict(use_lora=options.use_lora, freeze_vla_backbone=options.freeze_vla_backbone)
    if options.dtype == "auto":
        dtype = weights_dtype(config, device, trainable=trainable, **learning)
    else:
        dtype = getattr(torch, options.dtype)
    acts_by = summary.mode.name if options.purpose == "evaluate" else "tokens"
    shared: dict[str, Any] = dict(
        dtype=dtype,
        num_images=options.num_images_in_input,
        load_l1_action_head=options.load_l1_action_head or acts_by == "l1",
        load_in_4bit=options.load_in_4bit,
    )
    rollout = estimate_memory(
        config,
        batch_size=options.num_envs,
        training=False,
        autoregressive=acts_by == "autoregressive",
        **shared,
    )
    needs = {"rollout": rollout}
    if trainable:
        training = functools.partial(
            estimate_memory,
            config,
            batch_size=options.batch_size,
            training=True,
            lora_rank=options.lora_rank,
            **learning,
            **shared,
        )
        needs["training"] = training(
            recompute=0.0 if options.gradient_checkpointing == "auto" else options.gradient_checkpointing
        )
        if options.gradient_checkpointing == "auto" and not fits_memory(device, needs["training"]):
            needs["training"] = training(recompute=1.0)
    checks = check_checkpoint(
        summary, purpose=options.purpose, task_suite=options.task_suite, num_images=options.num_images_in_input
    )
    checks += check_machine(device, dtype, needs, load_in_4bit=options.load_in_4bit)
    diagnosis = Diagnosis(summary, needs, checks)
    print(diagnosis)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, diagnosis.as_dict())
        print(f"\nFindings: {options.json}")
    sys.exit(FITS if diagnosis.fits else PROBLEMS)
