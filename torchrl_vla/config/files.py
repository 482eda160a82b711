"""Configurations as JSON files: written and read in one place each, old files included."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Any, Self, TypeVar

from torchrl_vla.errors import UserError
from torchrl_vla.files import write_json

__all__ = ["SavedConfig", "convert_0_1_0"]

T = TypeVar("T")

#: Fields of 0.1.0 that have another name now.
_RENAMED_IN_TRAIN = {"recompute": "gradient_checkpointing"}
_RENAMED_IN_FINETUNE = {
    "out": "run_dir",
    "checkpoint": "pretrained_checkpoint",
    "batch_size": "mini_batch_size",
    "micro_batch_size": "batch_size",
    "learning_rate": "actor_lr",
    "warmup_steps": "lr_warmup_steps",
}


class SavedConfig:
    """A configuration (a dataclass, perhaps of dataclasses) that a run's folder keeps."""

    def save(self, path: Path) -> None:
        """Write as JSON, to be read again by `load`.

        Args:
            path: the file.
        """
        write_json(path, dataclasses.asdict(self))  # type: ignore[call-overload]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote, in this version or in 0.1.0.

        Args:
            path: the file, `config.json` in the folder of a run.

        Raises:
            ValueError: there is no such file, it is no JSON, or it is of a run of another command or version.
        """
        if not os.path.isfile(path):
            raise UserError(
                f"{path.parent} is not the folder of a run: it has no {path.name}. Leave out --resume to start one."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}): the run cannot be resumed from it.") from error
        try:
            config: Self = _build(cls, convert_0_1_0(values))
        except (TypeError, KeyError, AttributeError) as error:
            command = cls.__name__.removesuffix("Config").lower()
            raise UserError(f"{path} was not written by this version of `torchrl-vla {command}`: {error}.") from error
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        return config


def _build(cls: type[T], values: dict[str, Any]) -> T:
    hints = typing.get_type_hints(cls)
    nested = {
        name: _build(hints[name], value) for name, value in values.items() if dataclasses.is_dataclass(hints.get(name))
    }
    return cls(**{**values, **nested})


def convert_0_1_0(values: dict[str, Any]) -> dict[str, Any]:
    """Rename what 0.1.0 wrote; what this version wrote is returned as it is.

    Args:
        values: content of a run's `config.json`.

    Examples:
        >>> convert_0_1_0({"ppo": {"recompute": 1.0}, "env": {"num_envs": 4}, "actor": {}})
        {'ppo': {'num_envs': 4, 'gradient_checkpointing': 1.0}, 'actor': {}}
    """
    if "env" in values:
        values = {**values, "ppo": _renamed({**values["env"], **values["ppo"]}, _RENAMED_IN_TRAIN)}
        del values["env"]
    elif "learning_rate" in values:
        values = _renamed(values, _RENAMED_IN_FINETUNE)
        values["gradient_checkpointing"] = float(values["gradient_checkpointing"])
        values["dataset"] = [values["dataset"]]
    return values


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}
