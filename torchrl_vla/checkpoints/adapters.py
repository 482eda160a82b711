"""Adapters alone: peft's files under upstream's names, in and out."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchrl_vla.checkpoints.finite import require_finite
from torchrl_vla.checkpoints.names import parameter_names, unused_shapes, upstream_name
from torchrl_vla.checkpoints.shards import listed
from torchrl_vla.errors import UserError
from torchrl_vla.files import read_json
from torchrl_vla.modules.openvla.linear import ADAPTER
from torchrl_vla.modules.openvla.lora import adaptable_modules, attach_adapters, lora_layers
from torchrl_vla.modules.openvla.model import OpenVLA

__all__ = ["load_adapter", "save_adapter"]

_PREFIX = "base_model.model."  # peft's name for the model that an adapter file belongs to
# Options of peft's that an adapter ``scale * B A`` of one rank and scale may have at any value: what they say is in the
# tensors, or says nothing of the weights. All others must be as peft has them where nobody asks for them.
_FREE = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type", "auto_mapping",
}  # fmt: skip
# Initial values that leave the base as it is. PiSSA, OLoRA, CorDA and LoftQ take their part out of it.
_PLAIN_STARTS = (True, False, None, "gaussian")


def save_adapter(model: OpenVLA, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the adapters alone, in peft's format under upstream's names.

    Args:
        model: a model with adapters.
        folder: where to write; made if it is not there.
        base_model: name of the checkpoint that the adapters belong to.

    Raises:
        ValueError: if the model has no adapters.
    """
    layers = lora_layers(model)
    if not layers:
        raise UserError("the model has no adapters to save.")
    layer = next(iter(layers.values()))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=layer.r[ADAPTER],
        lora_alpha=layer.lora_alpha[ADAPTER],
        lora_dropout=getattr(layer.lora_dropout[ADAPTER], "p", 0.0),
        target_modules=sorted({upstream_name(f"{name}.weight").split(".")[-2] for name in layers}),
        init_lora_weights="gaussian",
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {
        _PREFIX + upstream_name(name).replace(f".{ADAPTER}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: OpenVLA, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> OpenVLA:
    """Add the adapters of a folder, ours or upstream's ``lora_adapter``, to a model without them.

    Args:
        model: the model the adapters belong to, changed in place.
        folder: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        dtype: dtype of the adapters' weights.

    Raises:
        ValueError: if a file is missing, or the adapters are of another kind, or for other modules or shapes.
    """
    folder = Path(folder)
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise UserError(f"{folder} has no {file.name}: name a folder that an adapter was saved in.")
    settings = read_json(config_file)
    _require_plain(settings, config_file)
    try:
        stored = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights_file} is truncated or no safetensors file ({error}): copy it again.") from error
    dead = {name.rpartition(".")[0] for name in unused_shapes(model.config)}
    tensors = {
        name: require_finite(tensor, name, weights_file)
        for key, tensor in stored.items()
        if (name := key.removeprefix(_PREFIX)).split(".lora_")[0] not in dead
    }
    _compare_base(model, tensors, weights_file)
    candidates = {upstream_name(f"{name}.").removesuffix("."): name for name in adaptable_modules(model)}
    modules = sorted({name.split(".lora_")[0] for name in tensors})
    foreign = [name for name in modules if name not in candidates]
    if foreign or not modules:
        named = ", ".join(foreign[:3]) or "none"
        raise UserError(f"{weights_file} is for other modules ({named}) than this model has.")
    attach_adapters(
        model,
        [candidates[name] for name in modules],
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout", 0.0),
        dtype=dtype,
    )
    adapters = {
        upstream_name(name).replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    for name, parameter in adapters.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise UserError(f"{name} is {found} in {weights_file}, but this model needs {list(parameter.shape)}.")
        parameter.data.copy_(tensors[name])
    left = sorted(set(tensors) - set(adapters))
    if left:
        raise UserError(f"{weights_file} has {listed(left)}, which a plain LoRA adapter has no place for.")
    return model


def _require_plain(settings: dict[str, Any], path: Path) -> None:
    """Refuse an adapter that is more than ``scale * B A``, or belongs to a base that peft has changed."""
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path} has peft_type {settings.get('peft_type')!r}: only plain LoRA adapters can be added.")
    start = settings.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{path} has init_lora_weights {start!r}, for which peft takes the adapter's start out of the base model: "
            "only plain LoRA adapters can be added. Convert it with peft's save_pretrained("
            "path_initial_model_for_weight_conversion=...)."
        )
    usual = LoraConfig().to_dict()
    # What this version of peft does not know has no value that is known to be harmless but an empty one.
    unsupported = [
        key
        for key, value in settings.items()
        if value and value != usual.get(key) and key not in _FREE and key != "init_lora_weights"
    ]
    if unsupported:
        raise UserError(f"{path} has {', '.join(sorted(unsupported))}: only plain LoRA adapters can be added.")
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if key not in settings:
            raise UserError(f"{path} lacks {key}: it was not written by peft.")
        if isinstance(value, bool) or not isinstance(value, int if key == "r" else (int, float)) or not 0 < value < inf:
            raise UserError(f"{path}: {key} must be a positive number, got {value!r}.")


def _compare_base(model: OpenVLA, tensors: dict[str, Tensor], path: Path) -> None:
    """Take out what peft writes under an adapter on lm_head, as upstream's are: it must be the model's own weight."""
    ours = parameter_names(model)
    for name in [name for name in tensors if ".base_layer." in name]:
        stored, own = tensors.pop(name), ours.get(name.replace(".base_layer.", "."))
        weight = None if own is None else model.get_parameter(own).detach()
        if weight is None or weight.shape != stored.shape or not torch.equal(stored.to(weight), weight):
            raise UserError(f"{path} has {name}, which is not this model's: the adapter belongs to another base model.")
