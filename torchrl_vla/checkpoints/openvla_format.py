"""A network in upstream's checkpoint format, in and out."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchrl_vla.checkpoints.architecture_file import CONFIG_FILE, write_architecture
from torchrl_vla.checkpoints.finite import require_finite
from torchrl_vla.checkpoints.folder import CheckpointFolder, open_checkpoint
from torchrl_vla.checkpoints.head_files import FOREIGN_HEADS, HEADS, head_step, read_head, write_head
from torchrl_vla.checkpoints.locations import resolve_checkpoint
from torchrl_vla.checkpoints.names import parameter_names, unused_shapes, unused_weight
from torchrl_vla.checkpoints.shards import INDEX, SINGLE, check_tensors
from torchrl_vla.checkpoints.statistics import STATISTICS_FILE, write_statistics
from torchrl_vla.errors import UserError
from torchrl_vla.files import replacing_files, write_json
from torchrl_vla.modules.openvla.attention import resolve_attention
from torchrl_vla.modules.openvla.linear import merged_weight
from torchrl_vla.modules.openvla.model import OpenVLA
from torchrl_vla.modules.openvla.quantization import check_4bit, prepare_4bit, quantize_weight

__all__ = ["load_openvla", "save_openvla", "upstream_tensors"]

_logger = logging.getLogger(__name__)

# Files that a checkpoint may have and another one not; left beside another's weights they would be taken for its own.
_OWN_FILES = (
    SINGLE, INDEX, "model-*-of-*.safetensors", STATISTICS_FILE, "vit_overrides.json",
    *(f"{kind}--*_checkpoint.pt" for kind in (*HEADS, *FOREIGN_HEADS)),
)  # fmt: skip


def load_openvla(
    checkpoint: str | Path | CheckpointFolder,
    *,
    dtype: torch.dtype | Literal["stored"] | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    load_l1_action_head: bool | None = None,
) -> OpenVLA:
    """Load an OpenVLA or OpenVLA-OFT, upstream's or one that :func:`save_openvla` wrote.

    One shard is in memory at a time, and each tensor goes straight onto its device.

    Args:
        checkpoint: a folder, opened already or not, or a Hugging Face repository.
        dtype: dtype of the weights; None for the checkpoint's on an accelerator and float32 on the CPU; ``stored`` for
            the checkpoint's anywhere, and the heads' own, so that no bit is lost.
        device: where to load them.
        attn_implementation: ``sdpa``, ``flash_attention_2`` or ``eager``; None for the fastest that runs.
        load_in_4bit: quantise the linear layers to 4 bits (NF4) through bitsandbytes; needs CUDA.
        load_l1_action_head: load ``action_head--N_checkpoint.pt``; None for where there is one. The token head is
            always there, so with it the model serves both.

    Returns:
        The model in eval mode. Its ``proprio_projector`` is there if the checkpoint has one.

    Raises:
        ValueError: a file is missing, truncated or unsafe, a tensor has another shape than the configuration says or
            numbers that are not finite, or an option is not available here.
    """
    if not isinstance(checkpoint, CheckpointFolder):
        checkpoint = open_checkpoint(resolve_checkpoint(checkpoint))
    config = checkpoint.config
    device = _check_device(device, load_in_4bit)
    head_dtype = None if dtype == "stored" else _choose_dtype(dtype, config.torch_dtype, device)
    dtype = head_dtype or getattr(torch, config.torch_dtype)
    proprio_file, action_file = (checkpoint.heads.get(kind) for kind in HEADS)
    if load_l1_action_head and action_file is None:
        raise UserError(
            f"{checkpoint.path} has no action_head--N_checkpoint.pt: load it with load_l1_action_head=False."
        )
    use_l1_head = load_l1_action_head is not False and action_file is not None
    if (checkpoint.path / "lora_adapter").is_dir():
        _logger.info(
            "%s: its lora_adapter folder is merged into the shards already, so it is not added again.", checkpoint.path
        )

    attention = resolve_attention(attn_implementation, device.type, dtype)
    with torch.device("meta"):
        model = OpenVLA(config, attn_implementation=attention, use_l1_head=use_l1_head)
    if load_in_4bit:
        prepare_4bit(model, device, dtype)
    unused = unused_shapes(config)
    ours = parameter_names(model)
    check_tensors(
        checkpoint.shards, {name: tuple(model.get_parameter(own).shape) for name, own in ours.items()} | unused
    )
    for path, names in checkpoint.shards.items():
        with safe_open(path, framework="pt", device=str(device)) as shard:
            for name in names:
                # A copy: a tensor of the file's own memory map would change with the file.
                tensor = shard.get_tensor(name)
                if name in unused:
                    model.unused_weights[name] = require_finite(tensor.to("cpu", copy=True), name, path)
                else:
                    tensor = require_finite(tensor.to(dtype, copy=device.type == "cpu"), name, path)
                    _assign(model, ours[name], tensor)
    for kind, head in (("proprio_projector", proprio_file), ("action_head", action_file if use_l1_head else None)):
        if head is not None:
            for name, tensor in read_head(model.get_submodule(kind), head).items():
                tensor = tensor.to(device, head_dtype or tensor.dtype, copy=True)
                _assign(model, f"{kind}.{name}", require_finite(tensor, name, head))
            model.checkpoint_step = head_step(head)
    return model.eval()


def _choose_dtype(dtype: torch.dtype | str | None, stored: str, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else getattr(torch, stored)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(
            f"dtype must be torch.float32, torch.bfloat16 or torch.float16, 'stored' or None, got {dtype!r}."
        )
    return dtype


def _check_device(name: torch.device | str, load_in_4bit: bool) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown: use cpu, cuda or cuda:N.") from error
    if load_in_4bit:
        check_4bit(device)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device '{device}' is not on this machine, which has {count} GPUs: use device='cpu'.")
    return device


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` in the place of a parameter that has no storage yet."""
    module = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    quantized = quantize_weight(module, leaf, tensor)
    setattr(module, leaf, nn.Parameter(tensor) if quantized is None else quantized)


def upstream_tensors(model: OpenVLA, *, merge_in_float32: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor of upstream's shards by its name there, adapters merged, one at a time in its own dtype.

    Args:
        model: the model; it is not changed.
        merge_in_float32: add an adapter to its weight in float32 and round once, not in the weight's dtype.
    """
    for name, own in sorted(parameter_names(model).items()):
        yield name, merged_weight(model, own, in_float32=merge_in_float32)
    for name, shape in unused_shapes(model.config).items():
        yield name, unused_weight(model, name, shape)


def save_openvla(
    model: OpenVLA,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    merge_in_float32: bool = True,
) -> None:
    """Write a model in upstream's format, adapters merged, so that upstream's code reads it, and ours.

    Args:
        model: the model; it is not changed.
        folder: where to write; made if it is not there. A checkpoint in it, its statistics included, is replaced once
            everything is written; other files stay.
        dtype: dtype of the weights; None for ``config.torch_dtype``.
        max_shard_bytes: most bytes in one file.
        merge_in_float32: add an adapter to its weight in float32 and round once, not in the weight's dtype.

    Raises:
        ValueError: the model was loaded in 4 bits.
    """
    if model.is_loaded_in_4bit:
        raise UserError(
            "a 4-bit model cannot be exported, its weights are rounded: save the adapter, load the checkpoint without "
            "load_in_4bit, load the adapter there and export that."
        )
    dtype = getattr(torch, model.config.torch_dtype) if dtype is None else dtype
    config = replace(model.config, torch_dtype=str(dtype).removeprefix("torch."))
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    with replacing_files(Path(folder), _is_own) as partial:
        write_architecture(config, partial)
        if config.dataset_statistics:
            write_statistics(partial, config.dataset_statistics)
        write_json(partial / "generation_config.json", generation)
        _save_shards(upstream_tensors(model, merge_in_float32=merge_in_float32), partial, dtype, max_shard_bytes)
        # Upstream keeps the projector in float32 and casts the action head.
        for kind, head_dtype in (("proprio_projector", torch.float32), ("action_head", dtype)):
            module = getattr(model, kind)
            if module is not None:
                write_head(module, partial, kind=kind, step=model.checkpoint_step, dtype=head_dtype)


def _is_own(path: Path) -> bool:
    return any(path.match(pattern) for pattern in _OWN_FILES)


def _save_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, max_bytes: int) -> None:
    """Write tensors to numbered shards and an index, with one shard in memory at a time."""
    parts: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        part = folder / f"part-{len(parts)}.tmp"
        save_file(shard, part, metadata={"format": "pt"})
        # safetensors lets only the owner read.
        shutil.copymode(folder / CONFIG_FILE, part)
        parts.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        if shard and size + tensor.nbytes > max_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        os.replace(folder / "part-0.tmp", folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(folder / f"part-{number}.tmp", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
