"""What episodes start from, kept on disk: settled initial states, for all processes and runs.

A training run starts episodes of some hundred initial states over and over, spread over dozens of processes. Each start
is named by everything that decides its bits, so that a file never has to be compared with anything, only to be whole.
A state takes some 40 kB.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import llvmlite.binding
import numpy as np

from torchrl_vla.envs.simulation.model_cache import cache_folder, keep_file, read_states, write_states

__all__ = ["code_key", "keep_start", "name_start", "read_start"]

#: Compiled code, and the linear algebra that it calls, whose versions can change a state's last bits.
_PACKAGES = ("numba", "llvmlite", "scipy")


def name_start(scene_key: str, init_state: np.ndarray, settle_steps: int, *, exact: bool) -> str:
    """Names the settled state of an initial state.

    Args:
        scene_key: of the task's scene, see :func:`~torchrl_vla.envs.simulation.model_cache.scene_key`.
        init_state: the flattened simulator state, float64 ``[state_size]``.
        settle_steps: control steps without motion after it.
        exact: whether physics are stock's.
    """
    text = f"{code_key(Path(__file__).parent)} {scene_key} {settle_steps} {exact} "
    return _digest(text.encode() + np.ascontiguousarray(init_state, dtype=np.float64).tobytes())


def read_start(name: str) -> np.ndarray | None:
    """Read a state that any process has kept; None if none has, or if the file is damaged."""
    return read_states(_path(name))


def keep_start(name: str, start: np.ndarray) -> None:
    """Keep a state. Of several processes that do so at once, the last one's file stays; all are equal."""
    path = _path(name)
    keep_file(path.parent, lambda target: write_states(target, start), lambda _: path.name)


@functools.cache
def code_key(folder: Path) -> str:
    """Return what settling depends on besides the scene: the code of a folder, its compiler and this processor.

    Processors of different makes get code with different instructions, and from NumPy's linear algebra other last bits.

    Args:
        folder: its Python files count.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    versions = [f"{name}={importlib.metadata.version(name)}" for name in _PACKAGES]
    processor = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    return f"{' '.join(versions)} {processor} {digest.hexdigest()}"


def _path(name: str) -> Path:
    return cache_folder() / "starts" / name[:2] / f"{name}.npz"


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:32]
