"""LIBERO as TensorDicts; knows no model.

Importing it imports neither MuJoCo nor OpenGL, and TorchRL (seconds) only when an environment is asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from torchrl_vla.envs.rendering import check_wanted_backend
from torchrl_vla.envs.tasks import SUITES, LiberoTask, TaskSuite, get_suite, suite_names

if (_cache := os.environ.get("TORCHRL_VLA_CACHE")) and "NUMBA_CACHE_DIR" not in os.environ:
    # Before numba is imported, by robosuite too: one folder to choose is enough.
    os.environ["NUMBA_CACHE_DIR"] = os.path.join(os.path.expanduser(_cache), "numba")

if TYPE_CHECKING:
    from torchrl_vla.envs.factory import make_env, make_envs
    from torchrl_vla.envs.instruction import InstructionFromTaskId
    from torchrl_vla.envs.libero import LiberoEnv

__all__ = [
    "SUITES",
    "InstructionFromTaskId",
    "LiberoEnv",
    "LiberoTask",
    "TaskSuite",
    "get_suite",
    "make_env",
    "make_envs",
    "suite_names",
]

_MODULES = {
    "InstructionFromTaskId": "instruction",
    "LiberoEnv": "libero",
    "make_env": "factory",
    "make_envs": "factory",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_wanted_backend()
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
