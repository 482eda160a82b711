"""Compiled models and scenes, kept in memory per process and on disk between processes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import sys
import tokenize
import uuid
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import mujoco
import numpy as np

from torchrl_vla.envs.installation import import_libero
from torchrl_vla.envs.simulation.scene import Scene
from torchrl_vla.errors import UserError

__all__ = [
    "CompiledModel",
    "cache_folder",
    "compile_model",
    "discard_file",
    "environment_key",
    "keep_file",
    "load_scene",
    "locked",
    "read_states",
    "scene_key",
    "write_states",
]

#: Changes whenever what is kept changes its meaning.
_FORMAT = 2
#: Modules whose code decides what is kept.
_MAKERS = ("scene_builder.py", "scene.py", "sampled_states.py")
_CHUNK = 1 << 24
#: What reading an archive raises that is cut off or changed.
_DAMAGED = (
    OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, SyntaxError, tokenize.TokenError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip


class CompiledModel:
    """A compiled model that everything in the process shares.

    Its fixtures' poses and site colours belong to no task in particular: whoever uses them writes them first.

    Args:
        model: MuJoCo's model.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        # Nothing reads the gripper's sensors, and what they measure changes nothing.
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
        self.model = model
        #: The scene whose fixture poses the model has.
        self.placed_for: Scene | None = None


_models: weakref.WeakValueDictionary[str, CompiledModel] = weakref.WeakValueDictionary()


def cache_folder() -> Path:
    """Return the folder of kept models and starts: ``TORCHRL_VLA_CACHE``, else the platform's place for caches."""
    if chosen := os.environ.get("TORCHRL_VLA_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path(os.path.expanduser("~")) / "Library" / "Caches" / "torchrl-vla"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "torchrl-vla"


def scene_key(bddl_file: Path, seed: int) -> str:
    """Names a task's scene, and with it the compiled model.

    Args:
        bddl_file: the task's definition.
        seed: seed of the fixtures' poses.
    """
    text = f"{environment_key()} {seed} ".encode() + bddl_file.read_bytes()
    return hashlib.sha256(text).hexdigest()[:32]


def load_scene(bddl_file: Path, seed: int) -> tuple[Scene, CompiledModel]:
    """Give a task's scene and its compiled model, from memory, from disk or by building them (some seconds).

    Kept files are named by the versions of MuJoCo, robosuite and LIBERO, LIBERO's assets and sources, the task's
    definition and the seed; one that is damaged is built again. Processes that need the same scene at the same time
    wait for the first to build it.

    Args:
        bddl_file: the task's definition.
        seed: seed of the fixtures' poses.

    Returns:
        tuple: the scene and the model, the same object for all tasks that share it.
    """
    path = cache_folder() / "scenes" / f"{scene_key(bddl_file, seed)}.npz"
    loaded = _load(path)
    if loaded is None:
        with locked(path):
            loaded = _load(path) or _build(path, bddl_file, seed)
    return loaded


def _load(path: Path) -> tuple[Scene, CompiledModel] | None:
    """Read a scene and its model, if both are there and whole."""
    try:
        scene = Scene.load(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _DAMAGED as error:
        discard_file(path, error)
        return None
    compiled = _models.get(scene.model_key)
    if compiled is None:
        model = _load_model(scene.model_key)
        if model is None:
            return None
        compiled = _models[scene.model_key] = CompiledModel(model)
    return scene, compiled


def _build(path: Path, bddl_file: Path, seed: int) -> tuple[Scene, CompiledModel]:
    from torchrl_vla.envs.simulation.scene_builder import build_scene

    try:
        scene, model = build_scene(bddl_file, seed, compile_model)
    finally:
        # The model is changed from here on, and 0.3 GB should not be held twice.
        compile_model.cache_clear()
    keep_file(path.parent, scene.save, lambda _: path.name)
    compiled = _models.get(scene.model_key)
    if compiled is None:
        compiled = _models[scene.model_key] = CompiledModel(model)
    return scene, compiled


@functools.lru_cache(maxsize=1)
def compile_model(xml: str) -> tuple[str, mujoco.MjModel]:
    """Compiles a model, or reads it where that was done before; remembers the last one, which robosuite asks for twice.

    Args:
        xml: robosuite's description of the task, with absolute paths of its assets.

    Returns:
        tuple: the model's key in the cache, and the model, not to be changed.
    """
    key = hashlib.sha256(f"{environment_key()} {xml}".encode()).hexdigest()[:32]
    model = _load_model(key)
    if model is None:
        model = mujoco.MjModel.from_xml_string(xml)
        _save_model(key, model)
    return key, model


def _load_model(key: str) -> mujoco.MjModel | None:
    """Read a model whose file has the checksum that its name states."""
    for path in sorted((cache_folder() / "models").glob(f"{key}-*.mjb")):
        try:
            if f"{_checksum(path):08x}" != path.stem.rpartition("-")[2]:
                raise UserError("its checksum is wrong")
            return mujoco.MjModel.from_binary_path(str(path))
        except (OSError, ValueError) as error:
            discard_file(path, error)
    return None


def _save_model(key: str, model: mujoco.MjModel) -> None:
    keep_file(
        cache_folder() / "models",
        lambda path: mujoco.mj_saveModel(model, str(path), None),
        lambda path: f"{key}-{_checksum(path):08x}.mjb",
    )


def keep_file(folder: Path, write: Callable[[Path], None], name: Callable[[Path], str]) -> None:
    """Write a file under another name and rename it, so that nobody ever reads a part of it.

    Where the folder cannot be written to, a warning says so once and nothing is kept.

    Args:
        folder: made if it does not exist.
        write: writes the file at the path it is given.
        name: what to call the written file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not of `tempfile`, whose files nobody else may read: a cache may be shared, or made for others.
        path = folder / f"{uuid.uuid4().hex}.tmp"
        try:
            write(path)
            path.replace(folder / name(path))
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        _warn_once(cache_folder(), error)


def read_states(path: Path) -> np.ndarray | None:
    """Read what :func:`write_states` wrote, with its checksum.

    Args:
        path: the archive.

    Returns:
        The array; None if there is no such file, or if it is damaged, of which a warning tells.
    """
    try:
        # Opened here, since NumPy leaves a file open that proves to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return archive["states"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _DAMAGED as error:
        discard_file(path, error)
        return None


def write_states(path: Path, states: np.ndarray) -> None:
    """Write an ``.npz`` archive, which has a checksum, under exactly this path.

    Args:
        path: where to.
        states: any array.
    """
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, states=states)


_warned: set[Path] = set()


def _warn_once(folder: Path, reason: OSError) -> None:
    if folder in _warned:
        return
    _warned.add(folder)
    warnings.warn(
        f"Compiled models cannot be kept in {folder}, or read there ({reason}): every process builds its own, some "
        "seconds per task. Set TORCHRL_VLA_CACHE to a folder of your own.",
        stacklevel=2,
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time build what a path is to hold; where there is nothing to lock, everyone builds.

    Args:
        path: the file to be built; the lock stands beside it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def environment_key() -> str:
    """Return what compiled models and sampled states depend on besides the task.

    That is versions, LIBERO's sources and assets by size and date, and the code here that makes them.
    """
    libero = import_libero()
    sources = Path(str(libero.__file__)).parent / "envs"
    digest = hashlib.sha256()
    for folder in (Path(libero.get_libero_path("assets")), sources):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                status = path.stat()
                digest.update(os.fsencode(f"{path} {status.st_size} {status.st_mtime_ns}"))
    for name in _MAKERS:
        digest.update((Path(__file__).parent / name).read_bytes())
    versions = [f"{name}={importlib.metadata.version(name)}" for name in ("mujoco", "robosuite", "numpy")]
    return f"{_FORMAT} {' '.join(versions)} {digest.hexdigest()}"


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def discard_file(path: Path, error: Exception) -> None:
    """Remove a file that is damaged, and warn of it; one that may not be read is somebody else's, and stays.

    Args:
        path: the file.
        error: what is wrong with it.
    """
    if isinstance(error, PermissionError):
        _warn_once(cache_folder(), error)
        return
    warnings.warn(f"{path} is damaged and will be built again: {error}", stacklevel=2)
    with contextlib.suppress(OSError):
        path.unlink()
