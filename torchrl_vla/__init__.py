"""Reinforcement-learning fine-tuning of vision-language-action policies in TorchRL.

Importing the package loads nothing heavy; its parts are there when they are first used.

Examples:
    >>> import torchrl_vla
    >>> policy = torchrl_vla.load_policy("bundled:tiny", task_suite="libero_spatial", trainable=False)
    >>> policy.actor.out_keys[0]
    'action'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_vla.checkpoints.policy import load_policy as load_policy

__version__ = "0.1.0"

__all__ = ["__version__", "collectors", "datasets", "envs", "load_policy", "modules", "objectives", "recipes"]

_ROOMS = ("collectors", "datasets", "envs", "modules", "objectives", "recipes")


def __getattr__(name: str) -> Any:
    if name == "load_policy":
        from torchrl_vla.checkpoints.policy import load_policy

        return load_policy
    if name in _ROOMS:
        return importlib.import_module(f"torchrl_vla.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
