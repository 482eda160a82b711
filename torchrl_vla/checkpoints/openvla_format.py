"""Upstream's checkpoint format, in and out."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchrl_vla.checkpoints.names import parameter_names, unused_shapes, unused_weight
from torchrl_vla.checkpoints.shards import (
    FOREIGN_HEADS,
    INDEX,
    SINGLE,
    check_shards,
    find_shards,
    head_file,
    head_step,
    listed,
    refuse_foreign_heads,
)
from torchrl_vla.config.releases import TOKEN_CHECKPOINTS
from torchrl_vla.modules.openvla.architecture import OpenVLAConfig
from torchrl_vla.modules.openvla.attention import resolve_attention
from torchrl_vla.modules.openvla.linear import merged_weight
from torchrl_vla.modules.openvla.quantization import check_4bit, prepare_4bit, quantize_weight

if TYPE_CHECKING:
    from torchrl_vla.modules.openvla.model import OpenVLA

_logger = logging.getLogger(__name__)

# The code is never run here: it says which upstream wrote the checkpoint, and goes along with an export.
_HUB_FILES = ["*.json", "*.safetensors", "*_checkpoint.pt", "tokenizer*", "*.model", "*.py"]

# Files that a checkpoint may have and another one not; left beside another's weights they would be taken for its own.
_OWN_FILES = [
    SINGLE, INDEX, "model-*-of-*.safetensors", "dataset_statistics.json", "vit_overrides.json",
    *(f"{kind}--*_checkpoint.pt" for kind in ("proprio_projector", "action_head", *FOREIGN_HEADS)),
]  # fmt: skip


def resolve_checkpoint(path_or_hub_id: str | Path, *, local_files_only: bool = False, use_local: bool = True) -> Path:
    """The folder of a checkpoint: a folder on disk, else a Hugging Face repository in the cache or downloaded.

    Args:
        path_or_hub_id: a folder, or a repository as ``owner/name``.
        local_files_only: do not use the network.
        use_local: look for a folder of that name first.

    Raises:
        ValueError: if there is no such folder and the repository cannot be had.
    """
    path = Path(path_or_hub_id).expanduser()
    if use_local and path.is_dir():
        return path
    advice = (
        "Name a folder that holds config.json and the *.safetensors, or download the repository where there is a "
        "network (`hf download OWNER/NAME --local-dir FOLDER`) and name that folder."
    )
    repo_id = str(path_or_hub_id)
    if path.is_absolute() or repo_id.startswith((".", "~")) or repo_id.count("/") != 1:
        raise ValueError(
            f"there is no checkpoint folder {repo_id!r}. {advice} Checkpoints with trained action tokens, which RL "
            f"needs: {', '.join(TOKEN_CHECKPOINTS)}; bundled:tiny comes with this package."
        )
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES, local_files_only=local_files_only))
    # A network lost on the way: an HTTPError of what huggingface_hub downloads with, or a RuntimeError of hf_xet.
    except (
        HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, RuntimeError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{repo_id!r} is no folder here, and the Hugging Face repository of that name cannot be had "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). {advice}"
        ) from error


def load_pretrained(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | Literal["stored"] | None,
    device: torch.device | str | None,
    attn_implementation: str | None,
    load_in_4bit: bool,
    local_files_only: bool,
    use_local: bool,
    load_l1_action_head: bool | None,
) -> OpenVLA:
    """What :meth:`OpenVLA.from_pretrained` does, one shard at a time, each tensor straight onto its device."""
    from torchrl_vla.modules.openvla.model import OpenVLA

    folder = resolve_checkpoint(path_or_hub_id, local_files_only=local_files_only, use_local=use_local)
    config = OpenVLAConfig.from_folder(folder)
    refuse_foreign_heads(folder)
    device = _check_device("cpu" if device is None else device, load_in_4bit)
    shards = find_shards(folder)
    heads_as_stored = dtype == "stored"
    if dtype == "stored" or (dtype is None and device.type != "cpu"):
        dtype = getattr(torch, config.torch_dtype)
    elif dtype is None:
        dtype = torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype must be torch.float32, torch.bfloat16 or torch.float16, 'stored' or None, got {dtype!r}."
        )
    head_dtype = None if heads_as_stored else dtype
    proprio_file = head_file(folder, "proprio_projector")
    action_file = head_file(folder, "action_head")
    if load_l1_action_head and action_file is None:
        raise ValueError(f"{folder} has no action_head--N_checkpoint.pt: load it with load_l1_action_head=False.")
    use_l1_head = load_l1_action_head is not False and action_file is not None
    if (folder / "lora_adapter").is_dir():
        _logger.info("%s: its lora_adapter folder is merged into the shards already, so it is not added again.", folder)

    attention = resolve_attention(attn_implementation, device.type, dtype)
    with torch.device("meta"):
        model = OpenVLA(config, attn_implementation=attention, use_l1_head=use_l1_head)
    if load_in_4bit:
        prepare_4bit(model, device, dtype)
    unused = unused_shapes(config)
    ours = parameter_names(model)
    check_shards(shards, {name: tuple(model.get_parameter(own).shape) for name, own in ours.items()} | unused)
    for path, names in shards.items():
        with safe_open(path, framework="pt", device=str(device)) as shard:
            for name in names:
                # A copy: a tensor of the file's own memory map would change with the file.
                tensor = shard.get_tensor(name)
                if name in unused:
                    model.unused_weights[name] = tensor.to("cpu", copy=True)
                else:
                    _assign(model, ours[name], tensor.to(dtype, copy=device.type == "cpu"))
    if proprio_file is not None:
        _load_head(model.proprio_projector, proprio_file, device, head_dtype)
    if use_l1_head:
        assert action_file is not None
        _load_head(model.action_head, action_file, device, head_dtype)
        model.checkpoint_step = head_step(action_file)
    elif proprio_file is not None:
        model.checkpoint_step = head_step(proprio_file)
    return model.eval()


def _check_device(name: torch.device | str, load_in_4bit: bool) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown: use cpu, cuda or cuda:N.") from error
    if load_in_4bit:
        check_4bit(device)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device '{device}' is not on this machine, which has {count} GPUs: use device='cpu'.")
    return device


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` in the place of a parameter that has no storage yet."""
    module = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    quantized = quantize_weight(module, leaf, tensor)
    setattr(module, leaf, nn.Parameter(tensor) if quantized is None else quantized)


def _load_head(module: nn.Module | None, path: Path, device: torch.device, dtype: torch.dtype | None) -> None:
    assert module is not None
    for name, tensor in read_head(module, path).items():
        _assign(module, name, tensor.to(device, dtype or tensor.dtype, copy=True))


def read_head(module: nn.Module, path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a head's ``.pt`` file by our names, mapped from the file; theirs start with ``module.``.

    Args:
        module: the head they are for, to be compared with.
        path: the file.
        device: ``cpu``, or ``meta`` to read no weights.

    Raises:
        ValueError: if the file is truncated or holds anything but tensors of this head's names and shapes.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and is not loaded: it could run code ({error}).") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is truncated or no PyTorch file ({error}): download it again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict of tensors, so no head can be read from it.")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"{path} lacks {name}.")
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{name} is {list(state[name].shape)} in {path}, but this model makes it {list(shape)}.")
    if set(state) - set(expected):
        raise ValueError(f"{path} has {listed(sorted(set(state) - set(expected)))}, which this head has no place for.")
    return state


def upstream_tensors(model: OpenVLA, *, merge_in_float32: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of upstream's shards by its name there, adapters merged, one at a time in its own dtype.

    Args:
        model: the model; it is not changed.
        merge_in_float32: add an adapter to its weight in float32 and round once, not in the weight's dtype.
    """
    for name, own in sorted(parameter_names(model).items()):
        yield name, merged_weight(model, own, in_float32=merge_in_float32)
    for name, shape in unused_shapes(model.config).items():
        yield name, unused_weight(model, name, shape)


def save_pretrained(
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
        ValueError: if the model was loaded in 4 bits.
    """
    if model.is_loaded_in_4bit:
        raise ValueError(
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
    with _replacing(Path(folder)) as partial:
        config.save(partial)
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        _save_shards(upstream_tensors(model, merge_in_float32=merge_in_float32), partial, dtype, max_shard_bytes)
        # Upstream keeps the projector in float32 and casts the action head.
        for kind, head_dtype in (("proprio_projector", torch.float32), ("action_head", dtype)):
            module = getattr(model, kind)
            if module is not None:
                state = {f"module.{name}": tensor.cpu().to(head_dtype) for name, tensor in module.state_dict().items()}
                torch.save(state, partial / f"{kind}--{model.checkpoint_step}_checkpoint.pt")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write a checkpoint in, whose files then take the place of those of a checkpoint in ``folder``.

    If writing fails, ``folder`` is left as it was. Files in it that are no checkpoint's stay.
    """
    partial = folder / "checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        written = sorted(path.name for path in partial.iterdir())
        for name in written:
            os.replace(partial / name, folder / name)
        for pattern in _OWN_FILES:
            for path in folder.glob(pattern):
                if path.name not in written:
                    path.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, max_bytes: int) -> None:
    """Write tensors to numbered shards and an index, with one shard in memory at a time."""
    parts: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        part = folder / f"part-{len(parts)}.tmp"
        save_file(shard, part, metadata={"format": "pt"})
        # safetensors lets only the owner read.
        shutil.copymode(folder / "config.json", part)
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
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
