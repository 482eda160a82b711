"""An architecture as upstream's ``config.json`` has it, in and out."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from torchrl_vla.checkpoints.statistics import read_statistics
from torchrl_vla.errors import UserError
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
    "chunk_size", "action_dim", "num_images", "use_proprio", "proprio_dim", "proprio_format", "bos_token_id",
    "eos_token_id", "empty_token_id", "n_action_bins", "pad_to_multiple_of", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "trained_for",
)  # fmt: skip
# Those of them that upstream's keys say too, with what a checkpoint that has no note of ours may say. No shape of a
# weight shows them; None: anything.
_NOTED_TOO: dict[str, tuple[Any, ...] | None] = {
    "n_action_bins": (256,),
    "pad_to_multiple_of": (64,),
    "rms_norm_eps": (1e-6, 1e-5),  # OpenVLA's and Llama-2's
    "num_attention_heads": None,
    "num_key_value_heads": None,
}
# Keys of config.json that make another network or other inputs of it, with the only values that are built. Other keys
# say nothing about the network.
_BUILT: dict[str, tuple[Any, ...]] = {
    "model_type": ("openvla",),
    "arch_specifier": ("no-align+fused-gelu-mlp",),
    "vision_backbone_id": ("dinosiglip-vit-so-224px",),
    "llm_backbone_id": ("llama2-7b-pure",),
    "image_resize_strategy": ("resize-naive",),
    "use_fused_vision_backbone": (True,),
    "timm_model_ids": (list(_TOWER_IDS),),
    "timm_override_act_layers": ([None, None],),
    "quantization_config": (None,),
    "tie_word_embeddings": (False,),
}
# The same for text_config. Llama's own fields that are built as they say are LLM_FIELDS.
_BUILT_TEXT: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_theta": (10000.0,),
    "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
    "rope_parameters": (
        None, {"rope_type": "default"}, {"rope_theta": 10000.0}, {"rope_type": "default", "rope_theta": 10000.0},
    ),
    "partial_rotary_factor": (None, 1.0),
    "pretraining_tp": (1,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}  # fmt: skip


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
        raise UserError(f"{folder} has no config.json: name a folder with an OpenVLA checkpoint.")
    raw = read_json(path)
    if "model_type" not in raw:
        raise UserError(f"{path} has no model_type, so it is not of an OpenVLA: download the checkpoint again.")
    for key in ("text_config", "norm_stats", _EXTENSION_KEY):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise UserError(f"{path}: {key} must be an object, got {raw[key]!r}.")
    text, extension = raw.get("text_config") or {}, raw.get(_EXTENSION_KEY) or {}
    _refuse_others(raw, _BUILT, f"{path}: ")
    _refuse_others(text, _BUILT_TEXT, f"{path}: text_config.")
    unknown = sorted(set(extension) - set(_EXTENSION_FIELDS))
    if unknown:
        raise UserError(f"{path} has a value that this version cannot read ({_EXTENSION_KEY}.{unknown[0]}).")
    sizes = raw.get("image_sizes", [224, 224])
    if not isinstance(sizes, list) or len(sizes) != 2 or sizes[0] != sizes[1]:
        raise UserError(f"{path}: image_sizes must be the same number twice, once for each tower, got {sizes!r}.")

    values: dict[str, Any] = {name: text[name] for name in (*LLM_FIELDS, "vocab_size") if name in text}
    values |= {name: raw[name] for name in ("pad_token_id", "pad_to_multiple_of", "n_action_bins") if name in raw}
    values |= {name: value for name, value in extension.items() if name != "use_proprio"}
    values["image_size"] = sizes[0]
    values["use_proprio"] = any(folder.glob("proprio_projector--*_checkpoint.pt"))
    if extension.get("use_proprio") and not values["use_proprio"]:
        raise UserError(
            f"{folder} lacks proprio_projector--N_checkpoint.pt, and config.json notes that the policy reads the "
            "robot's state: copy the file too."
        )
    # Its name in transformers 4 and 5.
    values["torch_dtype"] = raw.get("torch_dtype", raw.get("dtype", "bfloat16"))
    values["norm_stats"] = raw.get("norm_stats") or {}
    values["dataset_statistics"] = read_statistics(folder)
    vit = _read_towers(folder / _TOWERS_FILE)
    try:
        for (name, default), tower_id in zip(_released_towers().items(), _TOWER_IDS, strict=True):
            values[name] = replace(default, **vit.get(tower_id, {}))
        config = OpenVLAConfig(**{**values, "upstream": raw, **overrides})
    except TypeError as error:
        where = ", or vit_overrides.json beside it," if "VisionTowerConfig" in str(error) else ""
        raise UserError(f"{path}{where} has a value that this version cannot read ({error}).") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    _refuse_disagreement(config, raw, text, extension, path)
    return config


def _refuse_others(found: dict[str, Any], built: dict[str, tuple[Any, ...]], where: str) -> None:
    for key, values in built.items():
        if key in found and not any(_same(found[key], value) for value in values):
            allowed = " or ".join(map(repr, values))
            raise UserError(
                f"{where}{key} is {found[key]!r}, but only {allowed} is built: with it, the checkpoint is another "
                "network than this package would run."
            )


def _same(found: Any, built: Any) -> bool:
    """Equal, and not 1 for True."""
    return found == built and isinstance(found, bool) == isinstance(built, bool)


def _refuse_disagreement(
    config: OpenVLAConfig, raw: dict[str, Any], text: dict[str, Any], extension: dict[str, Any], path: Path
) -> None:
    """Compare what a configuration says twice, and what it must say for the tokens to be where they are looked for."""
    for key, usual in _NOTED_TOO.items():
        known = (extension[key],) if key in extension else usual
        value = text.get(key, raw.get(key))
        if value is not None and known is not None and value not in known:
            raise UserError(
                f"{path}: {key} is {value!r}, but the weights were trained with {' or '.join(map(str, known))}: "
                "another value makes another policy of them."
            )
    says = [("text_config.head_dim", text.get("head_dim"), config.head_dim)]
    if config.pad_to_multiple_of:
        says.append(("pad_token_id", raw.get("pad_token_id"), config.tokenizer_vocab_size))
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        says.append((f"text_config.{key}", text.get(key), getattr(config, key)))
    for key, value, expected in says:
        if value is not None and value != expected:
            raise UserError(
                f"{path}: {key} is {value!r}, but the rest of the configuration makes it {expected}: it is of another "
                "network, or was edited."
            )


def _read_towers(path: Path) -> dict[str, Any]:
    vit = read_json(path) if path.exists() else {}
    for tower_id, tower in vit.items():
        if tower_id not in _TOWER_IDS or not isinstance(tower, dict):
            raise UserError(
                f"{path}: {tower_id} is {tower!r}; sizes of {' and '.join(_TOWER_IDS)} are expected, each an object."
            )
    return vit


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
    """Return what ``config.json`` says."""
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
