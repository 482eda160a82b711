"""Adapters alone: peft's files under upstream's names, in and out."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from torchrl_vla.checkpoints.names import unused_shapes, upstream_name
from torchrl_vla.files import read_json
from torchrl_vla.modules.openvla.linear import ADAPTER
from torchrl_vla.modules.openvla.lora import adaptable_modules, attach_adapters, lora_layers
from torchrl_vla.modules.openvla.model import OpenVLA

__all__ = ["load_adapter", "save_adapter"]

_PREFIX = "base_model.model."  # peft's name for the model that an adapter file belongs to
# Options of peft's that make an adapter more than ``scale * B A`` of one rank and scale.
_UNSUPPORTED = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")


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
        raise ValueError("the model has no adapters to save.")
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
            raise ValueError(f"{folder} has no {file.name}: name a folder that an adapter was saved in.")
    settings = read_json(config_file)
    unsupported = [key for key in _UNSUPPORTED if settings.get(key)]
    if settings.get("peft_type") != "LORA" or unsupported:
        what = ", ".join(unsupported) or f"peft_type {settings.get('peft_type')!r}"
        raise ValueError(f"{config_file} has {what}: only plain LoRA adapters can be added.")

    missing = [key for key in ("r", "lora_alpha") if key not in settings]
    if missing:
        raise ValueError(f"{config_file} lacks {', '.join(missing)}: it was not written by peft.")
    try:
        stored = load_file(weights_file)
    except SafetensorError as error:
        raise ValueError(f"{weights_file} is truncated or no safetensors file ({error}): copy it again.") from error
    dead = {name.rpartition(".")[0] for name in unused_shapes(model.config)}
    # Where an adapter is on lm_head, as upstream's are, peft writes the weight under it too: the base model has that.
    tensors = {
        name: tensor
        for key, tensor in stored.items()
        if (name := key.removeprefix(_PREFIX)).split(".lora_")[0] not in dead and ".base_layer." not in name
    }
    candidates = {upstream_name(f"{name}.").removesuffix("."): name for name in adaptable_modules(model)}
    modules = sorted({name.split(".lora_")[0] for name in tensors})
    foreign = [name for name in modules if name not in candidates]
    if foreign or not modules:
        named = ", ".join(foreign[:3]) or "none"
        raise ValueError(f"{weights_file} is for other modules ({named}) than this model has.")
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
            raise ValueError(f"{name} is {found} in {weights_file}, but this model needs {list(parameter.shape)}.")
        parameter.data.copy_(tensors[name])
    return model
