"""The files beside the weights that upstream's code, and ours, needs to load a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from torchrl_vla.files import write_json
from torchrl_vla.modules.openvla.architecture import OpenVLAConfig

__all__ = ["copy_companions", "save_companions", "write_preprocessor"]

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json")
_OTHERS = ("preprocessor_config.json", "processor_config.json", "processor.json", "*.py")
# Upstream's processor rounds DINOv2's statistics to bfloat16; these are what it applies.
_MEANS = ([0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5])
_STDS = ([0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5])
_BICUBIC = 3


def copy_companions(source: Path, folder: Path) -> None:
    """Take a checkpoint's tokenizer, processor settings and code along, byte by byte, where it has them.

    Args:
        source: a checkpoint folder.
        folder: the folder that its weights are written to.
    """
    for pattern in (*_TOKENIZER, *_OTHERS):
        for path in source.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def save_companions(tokenizer: PreTrainedTokenizerBase, config: OpenVLAConfig, folder: Path) -> None:
    """Write what goes with a model: the files of the checkpoint that its tokenizer was loaded from, else new ones.

    Args:
        tokenizer: the model's.
        config: the model's.
        folder: the folder that its weights are written to.
    """
    source = Path(tokenizer.name_or_path)
    if tokenizer.name_or_path and source.is_dir():
        # transformers writes a tokenizer in its own version's format, which upstream's version may not read.
        copy_companions(source, folder)
    else:
        tokenizer.save_pretrained(folder)
    write_preprocessor(config, folder)


def write_preprocessor(config: OpenVLAConfig, folder: Path) -> None:
    """Write the settings of upstream's image processor, ``preprocessor_config.json``, if they are not there.

    Args:
        config: the model's.
        folder: a checkpoint folder.
    """
    path = folder / "preprocessor_config.json"
    if path.exists():
        return
    size = config.image_size
    resize = {"antialias": True, "interpolation": _BICUBIC, "max_size": None, "size": [size, size]}
    settings: dict[str, Any] = {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, size, size]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": _MEANS,
        "processor_class": "PrismaticProcessor",
        "stds": _STDS,
        "tvf_crop_params": [{"output_size": [size, size]}] * 2,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": mean, "std": std} for mean, std in zip(_MEANS, _STDS, strict=True)
        ],
        "tvf_resize_params": [resize] * 2,
        "use_fused_vision_backbone": True,
    }
    write_json(path, settings)
