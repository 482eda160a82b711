"""An architecture as upstream's ``config.json`` has it, in and out."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from torchrl_vla.checkpoints.statistics import STATISTICS_FILE
from torchrl_vla.files import read_json, write_json
from torchrl_vla.modules.openvla.architecture import LLM_FIELDS, OpenVLAConfig

__all__ = ["CONFIG_FILE", "read_architecture", "write_architecture"]

CONFIG_FILE = "config.json"
# Exact sizes of towers that are not the released ones.
_TOWERS_FILE = "vit_overrides.json"
# timm names of the two towers; upstream's config.json and vit_overrides.json speak of them so.
_TOWER_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
# Fields of ours that upstream's config.json has no place for; they go under one key, and only where they differ.
_EXTENSION_KEY = "torchrl_vla"
_EXTENSION_FIELDS = (
    "chunk_size", "action_dim", "num_images", "proprio_dim", "proprio_format", "bos_token_id", "eos_token_id",
    "empty_token_id", "trained_for",
)  # fmt: skip


def read_architecture(folder: str | Path, **overrides: Any) -> OpenVLAConfig:
    """Read upstream's ``config.json``, with ``dataset_statistics.json`` and ``vit_overrides.json`` where present.

    The robot's state is read where the folder has a ``proprio_projector--N_checkpoint.pt``.

    Args:
        folder: a checkpoint folder.
        overrides: fields to replace, such as the dtype that the shards have.

    Raises:
        ValueError: there is no ``config.json``, or it is not of a DINOv2 + SigLIP + Llama OpenVLA.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: name a folder with an OpenVLA checkpoint.")
    raw = read_json(path)
    if raw.get("model_type") != "openvla":
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}; only 'openvla' can be read.")
    for key in ("text_config", _EXTENSION_KEY):
        if not isinstance(raw.get(key, {}), dict):
            raise ValueError(f"{path}: {key} must be an object, got {raw[key]!r}.")
    towers = tuple(raw.get("timm_model_ids", _TOWER_IDS))
    if towers != _TOWER_IDS:
        raise ValueError(f"{path}: timm_model_ids are {list(towers)}; only {list(_TOWER_IDS)} are built.")
    sizes = raw.get("image_sizes", [224, 224])
    if len(set(sizes)) != 1:
        raise ValueError(f"{path}: image_sizes {sizes} differ; both towers must see the same size.")

    text = raw.get("text_config", {})
    values: dict[str, Any] = {name: text[name] for name in (*LLM_FIELDS, "vocab_size") if name in text}
    values |= {name: raw[name] for name in ("pad_token_id", "pad_to_multiple_of", "n_action_bins") if name in raw}
    values |= raw.get(_EXTENSION_KEY, {})
    values["image_size"] = sizes[0]
    values["use_proprio"] = any(folder.glob("proprio_projector--*_checkpoint.pt"))
    # Its name in transformers 4 and 5.
    values["torch_dtype"] = raw.get("torch_dtype", raw.get("dtype", "bfloat16"))
    values["norm_stats"] = raw.get("norm_stats") or {}
    values["dataset_statistics"] = _read_if_there(folder / STATISTICS_FILE)
    vit = _read_if_there(folder / _TOWERS_FILE)
    try:
        for (name, default), tower_id in zip(_released_towers().items(), _TOWER_IDS, strict=True):
            values[name] = replace(default, **vit.get(tower_id, {}))
        return OpenVLAConfig(**{**values, "upstream": raw, **overrides})
    except TypeError as error:
        where = ", or vit_overrides.json beside it," if "VisionTowerConfig" in str(error) else ""
        raise ValueError(f"{path}{where} has a value that this version cannot read ({error}).") from error


def write_architecture(config: OpenVLAConfig, folder: str | Path) -> None:
    """Write ``config.json``, and ``vit_overrides.json`` where the towers are not the released ones.

    Args:
        config: the architecture.
        folder: an existing folder.
    """
    folder = Path(folder)
    write_json(folder / CONFIG_FILE, _as_upstream(config))
    vit = {}
    for (name, default), tower_id in zip(_released_towers().items(), _TOWER_IDS, strict=True):
        tower = getattr(config, name)
        changed = {f.name: getattr(tower, f.name) for f in fields(tower)}
        vit[tower_id] = {key: value for key, value in changed.items() if value != getattr(default, key)}
    if any(vit.values()):
        write_json(folder / _TOWERS_FILE, vit)


def _as_upstream(config: OpenVLAConfig) -> dict[str, Any]:
    """What ``config.json`` says."""
    llama_defaults = LlamaConfig()
    text = dict(config.upstream.get("text_config", {}))
    for name in LLM_FIELDS:
        value = getattr(config, name)
        # Upstream leaves out what LlamaConfig has as its default.
        implied = name not in text and name != "num_key_value_heads" and value == getattr(llama_defaults, name)
        if value is not None and not implied:
            text[name] = value
    text |= {"model_type": "llama", "pad_token_id": config.pad_token_id, "torch_dtype": config.torch_dtype}
    # The other name of torch_dtype, which is written instead: it could say another one.
    text.pop("dtype", None)
    text["vocab_size"] = config.vocab_size
    defaults = {f.name: f.default for f in fields(config)}
    extension = {name: getattr(config, name) for name in _EXTENSION_FIELDS if getattr(config, name) != defaults[name]}
    raw = {
        "arch_specifier": "no-align+fused-gelu-mlp",
        "architectures": ["OpenVLAForActionPrediction"],
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive",
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": config.max_position_embeddings,
        "output_projector_states": False,
        "timm_override_act_layers": [None, None],
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        **{key: value for key, value in config.upstream.items() if key not in (_EXTENSION_KEY, "dtype")},
        "image_sizes": [config.image_size, config.image_size],
        "model_type": "openvla",
        "n_action_bins": config.n_action_bins,
        "norm_stats": config.norm_stats,
        "pad_to_multiple_of": config.pad_to_multiple_of,
        "pad_token_id": config.pad_token_id,
        "text_config": text,
        "timm_model_ids": list(_TOWER_IDS),
        "torch_dtype": config.torch_dtype,
    }
    return raw | ({_EXTENSION_KEY: extension} if extension else {})


def _released_towers() -> dict[str, Any]:
    released = OpenVLAConfig.seven_b()
    return {"dinov2": released.dinov2, "siglip": released.siglip}


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
