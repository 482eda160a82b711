"""LIBERO as TensorDicts; knows no model.

Importing it imports neither MuJoCo nor OpenGL, and TorchRL (seconds) only when an environment is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchrl_vla.envs.rendering import check_wanted_backend
from torchrl_vla.envs.tasks import SUITES, LiberoTask, TaskSuite, get_suite, suite_names

if TYPE_CHECKING:
    from torchrl_vla.envs.instruction import InstructionFromTaskId
    from torchrl_vla.envs.libero import LiberoEnv

__all__ = ["SUITES", "InstructionFromTaskId", "LiberoEnv", "LiberoTask", "TaskSuite", "get_suite", "suite_names"]

_MODULES = {"InstructionFromTaskId": "instruction", "LiberoEnv": "libero"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_wanted_backend()
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
