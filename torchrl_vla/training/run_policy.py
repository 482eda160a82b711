"""The policy of a run as one of its checkpoints has it, for other tools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torchrl.checkpoint import Checkpoint, CheckpointError

from torchrl_vla.checkpoints.adapters import save_adapter
from torchrl_vla.checkpoints.exporting import MergeDtype, check_out, export_checkpoint
from torchrl_vla.checkpoints.integrity import find_damage
from torchrl_vla.checkpoints.locations import CHECKPOINTS, RANDOM
from torchrl_vla.checkpoints.policy import Policy, load_policy, save_policy
from torchrl_vla.config import TrainConfig
from torchrl_vla.errors import UserError
from torchrl_vla.files import read_json, whole_folder
from torchrl_vla.modules.openvla.lora import has_lora
from torchrl_vla.training.run_checkpoints import TrainableState, newest_whole

__all__ = ["export", "load_run"]


def export(
    source: str,
    out: Path,
    *,
    adapter: Path | None = None,
    adapter_only: bool = False,
    merge_dtype: MergeDtype = "float32",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a policy in upstream's format, so that upstream's code loads it, or its adapters in peft's.

    Args:
        source: a run's folder, one of its checkpoints, or the folder or hub id of a policy.
        out: folder to write; it appears once everything in it is written.
        adapter: folder of an adapter to add to a policy that has none.
        adapter_only: write the adapters alone.
        merge_dtype: how an adapter is added to its weight.
        dtype: dtype of the shards; None for the checkpoint's.
        overwrite: replace a checkpoint or adapter in `out`; never the folder of a run.

    Raises:
        ValueError: `out` must not be written to, the source cannot be read, or it has no adapters.
    """
    check_out(out, overwrite)
    options: dict[str, Any] = {"adapter_only": adapter_only, "merge_dtype": merge_dtype, "dtype": dtype}
    run = _run_of(source)
    if run is None:
        export_checkpoint(source, out, adapter=adapter, **options)
        return
    if adapter is not None:
        raise UserError("a run has its own adapters: leave out the adapter, or name the policy to add it to.")
    policy = load_run(*run, dtype=dtype)
    if not adapter_only:
        save_policy(policy, out, dtype=dtype, merge_in_float32=merge_dtype == "float32")
        return
    if not has_lora(policy.model):
        raise UserError(f"the run {source} was trained without adapters (use_lora off): export its policy as a whole.")
    with whole_folder(out) as partial:
        base = TrainConfig.load(run[0] / "config.json").actor.pretrained_checkpoint
        save_adapter(policy.model, partial, base_model=base)


def load_run(folder: Path, checkpoint: Path, *, dtype: torch.dtype | None = None) -> Policy:
    """Return the policy of a run as one of its checkpoints has it, adapters apart, on the CPU.

    Args:
        folder: of the run.
        checkpoint: one of its checkpoints.
        dtype: of the weights; None for the dtype they are stored in, and float32 for weights that learned themselves.

    Raises:
        ValueError: the run's policy cannot be had, or the checkpoint is not of it.
    """
    config = TrainConfig.load(folder / "config.json")
    if config.actor.pretrained_checkpoint.startswith(RANDOM) and (
        config.actor.use_lora or config.actor.freeze_vla_backbone
    ):
        raise UserError(
            f"the run in {folder} started from random weights, which differ between devices, and its checkpoints keep "
            f"only what learned: its policy as a whole is in {folder / 'policy'}."
        )
    # Adapters are added to whole weights, wherever the run kept its own.
    actor = replace(config.actor, load_in_4bit=False, use_multi_gpu=False, force=True)
    torch.manual_seed(config.ppo.seed)  # random:tiny is made from it
    # Weights that learned themselves did so in float32, whatever those they started from are stored in.
    stored: Literal["stored"] | None = "stored" if actor.use_lora or actor.freeze_vla_backbone else None
    policy = load_policy(actor, task_suite=config.ppo.task_suite, dtype=dtype or stored)
    if policy.model.config.use_proprio:
        policy.model.config = replace(policy.model.config, proprio_format=config.ppo.proprio_format)
    try:
        Checkpoint(policy=TrainableState(policy.model)).load(checkpoint, components=["policy"], map_location="cpu")
    except CheckpointError as error:
        raise UserError(f"{checkpoint} does not hold the policy of the run in {folder}: {error}.") from error
    return policy


def _run_of(source: str) -> tuple[Path, Path] | None:
    """Return the folder of a run of `torchrl-vla train` and the checkpoint meant; None if `source` is neither."""
    path = Path(source).expanduser()
    named = path.parent.name == CHECKPOINTS and path.is_dir()
    run = path.parent.parent if named else path
    settings = run / "config.json"
    # A policy's config.json is none of a run. Fine-tuning writes such folders too, with a policy that is finished.
    if any(run.glob("*.safetensors")) or not settings.is_file() or "ppo" not in read_json(settings):
        return None
    if named:
        if damage := find_damage(path):
            raise UserError(f"{path} is damaged: {'; '.join(damage[:3])}. Export another checkpoint of the run.")
        return run, path
    newest = newest_whole(run / CHECKPOINTS)
    if newest is None:
        raise UserError(
            f"the run in {run} has no checkpoint: it ended before its first one, and there is nothing to export."
        )
    return run, newest
