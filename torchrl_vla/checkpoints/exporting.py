"""A policy for other tools: upstream's format with adapters merged, or the adapters alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation

from torchrl_vla.checkpoints.companions import copy_companions, write_preprocessor
from torchrl_vla.checkpoints.files import read_json
from torchrl_vla.checkpoints.policy import CHECKPOINTS, RANDOM, Policy, find_policy, load_policy, save_policy
from torchrl_vla.config import TrainConfig
from torchrl_vla.modules import OpenVLA
from torchrl_vla.modules.openvla import load_adapter, save_adapter
from torchrl_vla.modules.openvla.lora import has_lora
from torchrl_vla.training.run_checkpoints import TrainableState
from torchrl_vla.training.run_folder import written_whole

__all__ = ["export", "load_run"]


def export(
    source: str,
    out: Path,
    *,
    adapter: Path | None = None,
    adapter_only: bool = False,
    merge_dtype: Literal["float32", "weights"] = "float32",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a policy in upstream's format, so that upstream's code loads it, or its adapters in peft's.

    Args:
        source: a run's folder, one of its checkpoints, or the folder or hub id of a policy.
        out: folder to write; it appears once everything in it is written.
        adapter: folder of an adapter to add to a policy that has none.
        adapter_only: write the adapters alone.
        merge_dtype: ``float32`` adds an adapter to its weight in float32 and rounds once; ``weights`` rounds the
            adapter's part to the weight's dtype first, as peft does.
        dtype: dtype of the shards; None for the checkpoint's.
        overwrite: replace a checkpoint or adapter in `out`; never the folder of a run.

    Raises:
        ValueError: `out` must not be written to, the source cannot be read, or it has no adapters.
    """
    _check_out(out, overwrite)
    options: dict[str, Any] = {"dtype": dtype, "merge_in_float32": merge_dtype == "float32"}
    run = _run_of(source)
    if run is not None:
        if adapter is not None:
            raise ValueError("a run has its own adapters: leave out the adapter, or name the policy to add it to.")
        policy = load_run(*run, dtype=dtype)
        if adapter_only:
            _require_adapters(policy.model, source)
            base = TrainConfig.load(run[0] / "config.json").actor.pretrained_checkpoint
            with written_whole(out) as partial:
                save_adapter(policy.model, partial, base_model=base)
            return
        save_policy(policy, out, **options)
        return

    folder = find_policy(source)
    if out.resolve() in folder.resolve().parents:
        raise ValueError(f"{out} holds the policy that is exported: choose another folder.")
    if adapter_only and adapter is None:
        raise ValueError(
            f"{source} is a policy with its adapters merged: export the adapters from the run's folder, whose "
            "checkpoints have them apart."
        )
    model = OpenVLA.from_pretrained(folder, dtype=dtype or "stored")
    if adapter is not None:
        load_adapter(model, adapter)
    with written_whole(out) as partial:
        if adapter_only:
            save_adapter(model, partial, base_model=source)
        else:
            model.save_pretrained(partial, **options)
            copy_companions(folder, partial)
            write_preprocessor(model.config, partial)


def load_run(folder: Path, checkpoint: Path, *, dtype: torch.dtype | None = None) -> Policy:
    """The policy of a run as one of its checkpoints has it, adapters apart, on the CPU.

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
        raise ValueError(
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
        raise ValueError(f"{checkpoint} does not hold the policy of the run in {folder}: {error}.") from error
    return policy


def _run_of(source: str) -> tuple[Path, Path] | None:
    """The folder of a run of `torchrl-vla train` and the checkpoint meant; None if `source` is neither."""
    path = Path(source).expanduser()
    named = path.parent.name == CHECKPOINTS and path.is_dir()
    run = path.parent.parent if named else path
    settings = run / "config.json"
    # Fine-tuning writes such folders too: its policy is finished, adapters merged.
    if not settings.is_file() or "ppo" not in read_json(settings):
        return None
    if named:
        return run, path
    latest = CheckpointRotation(run / CHECKPOINTS, keep_last=1).latest() if (run / CHECKPOINTS).is_dir() else None
    if latest is None:
        raise ValueError(
            f"the run in {run} has no checkpoint: it ended before its first one, and there is nothing to export."
        )
    return run, latest


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{out} exists already: choose another folder, or pass --overwrite to replace it.")
    config = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    # Days of work: runs have a config.json too, that of their options.
    if any(out.rglob(CHECKPOINTS)) or "ppo" in config:
        raise ValueError(f"{out} is the folder of a run, or holds one, and is not replaced: choose another folder.")
    # A fine-tuning without a checkpoint so far: its config.json has options too, and no model_type.
    adapter = not config and (out / "adapter_config.json").is_file()
    if config.get("model_type") != "openvla" and not adapter:
        raise ValueError(f"{out} is neither a checkpoint nor an adapter, and is not replaced: choose another folder.")


def _require_adapters(model: OpenVLA, source: str) -> None:
    if not has_lora(model):
        raise ValueError(f"the run {source} was trained without adapters (use_lora off): export its policy as a whole.")
