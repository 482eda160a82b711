"""Choosing how MuJoCo renders without a display: on a GPU through EGL, or in software through OSMesa."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torchrl_vla.errors import UserError

__all__ = [
    "RenderingUnavailable",
    "check_wanted_backend",
    "configure_rendering",
    "egl_devices",
    "has_gpu",
    "make_gl_context",
    "renderer_name",
]

logger = logging.getLogger(__name__)

_LIBRARIES = {"egl": ("libEGL.so.1", "libEGL.so"), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}
_SOFTWARE = ("llvmpipe", "softpipe", "swr")
_PROBE = """
import mujoco
context = mujoco.GLContext(8, 8)
context.make_current()
from OpenGL import GL
print(GL.glGetString(GL.GL_RENDERER).decode())
"""
# EGL is known to hang on some hosts; a context that works takes about a second.
_PROBE_SECONDS = 60


class RenderingUnavailable(UserError, RuntimeError):
    """There is no OpenGL to render with; the message says what to install."""


@functools.cache
def configure_rendering() -> str:
    """Chooses the OpenGL backend of this process and its children, before robosuite is imported.

    ``MUJOCO_GL`` wins where it is set. Otherwise EGL is taken when it renders on a GPU, else OSMesa, else EGL in
    software; each is tried in a fresh process. ``MUJOCO_GL`` and ``PYOPENGL_PLATFORM`` are set to the choice.

    Returns:
        str: ``"egl"`` or ``"osmesa"``.

    Raises:
        ValueError: ``MUJOCO_GL`` or ``PYOPENGL_PLATFORM`` asks for something that cannot render LIBERO.
        RenderingUnavailable: there is no OpenGL to render with.
        RuntimeError: PyOpenGL was imported before the choice.
    """
    backend = check_wanted_backend()
    if backend is None:
        if "OpenGL" in sys.modules and not os.environ.get("PYOPENGL_PLATFORM"):
            raise RuntimeError(
                "PyOpenGL was imported before a backend without a display was chosen, and it chooses only once. Make "
                "the LIBERO environment first, or set MUJOCO_GL=egl (GPU) or MUJOCO_GL=osmesa (CPU)."
            )
        backend = _choose()
    platform = os.environ.get("PYOPENGL_PLATFORM") or backend
    if platform.lower() != backend:
        raise UserError(
            f"PYOPENGL_PLATFORM={platform!r} contradicts MUJOCO_GL={backend!r}. Unset PYOPENGL_PLATFORM, or set both "
            "to the same value."
        )
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = backend
    return backend


def make_gl_context(width: int, height: int) -> Any:
    """Make an OpenGL context of the chosen backend, also when MuJoCo was imported before the choice.

    Args:
        width: of the pictures, in pixels.
        height: likewise.

    Returns:
        GLContext: MuJoCo's, with ``make_current()`` and ``free()``.
    """
    return importlib.import_module(f"mujoco.{configure_rendering()}").GLContext(width, height)


@functools.cache
def renderer_name(backend: str, device: int | None = None) -> str:
    """Asks OpenGL, in a fresh process, what a backend renders with.

    Args:
        backend: ``"egl"`` or ``"osmesa"``.
        device: EGL's number of a GPU; None: the first that works.

    Returns:
        str: OpenGL's name of the renderer, such as ``"NVIDIA H100 80GB HBM3/PCIe/SSE2"`` or ``"llvmpipe (...)"``.

    Raises:
        RuntimeError: the backend cannot make a context; the message holds the last line of what it printed.
    """
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    if device is not None:
        environment["MUJOCO_EGL_DEVICE_ID"] = str(device)
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{backend} did not make an OpenGL context within {_PROBE_SECONDS} s") from None
    if probe.returncode:
        lines = probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"]
        raise RuntimeError(f"{backend} cannot make an OpenGL context: {lines[-1]}")
    return probe.stdout.strip()


def check_wanted_backend() -> str | None:
    """Check what the user asks for with ``MUJOCO_GL``, better before MuJoCo (which TorchRL imports) trips over it.

    Returns:
        str or None: ``"egl"``, ``"osmesa"``, or None when the variable is not set.

    Raises:
        ValueError: it asks for something that cannot render LIBERO.
        RenderingUnavailable: its library is not installed.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not wanted:
        return None
    if wanted not in _LIBRARIES:
        raise UserError(
            f"MUJOCO_GL={wanted!r} cannot render LIBERO without a display: set it to 'egl' (GPU) or 'osmesa' (CPU), or "
            "unset it to have one chosen."
        )
    for library in _LIBRARIES[wanted]:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return wanted
    raise RenderingUnavailable(_missing([f"MUJOCO_GL={wanted} is set and {_LIBRARIES[wanted][0]} is not installed"]))


@functools.cache
def egl_devices() -> tuple[int, ...]:
    """Return the GPUs that processes which draw are to be spread over, by EGL's numbers.

    They are those that CUDA may use (``CUDA_VISIBLE_DEVICES``), where EGL draws on what it numbers alike.

    Returns:
        tuple of int: empty where EGL may choose, as there is one GPU, or ``MUJOCO_EGL_DEVICE_ID`` has chosen.
    """
    if configure_rendering() != "egl" or os.environ.get("MUJOCO_EGL_DEVICE_ID"):
        return ()
    # Not above: simulators do without.
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = list(range(torch.cuda.device_count()))
        if len(gpus) < 2:
            return ()
    else:
        # CUDA's other names of GPUs, such as GPU-8932f937, mean nothing to EGL.
        gpus = [int(name) for name in visible.split(",") if name.strip().isdigit()]
    with ThreadPoolExecutor() as pool:
        chosen = tuple(gpu for gpu, draws in zip(gpus, pool.map(_draws_on, gpus), strict=True) if draws)
    logger.info("Drawing on the GPUs %s of EGL", ", ".join(map(str, chosen)) or "that it chooses")
    return chosen


def _draws_on(gpu: int) -> bool:
    try:
        return not _in_software(renderer_name("egl", gpu))
    except RuntimeError:
        return False


def has_gpu() -> bool:
    """Whether this machine shows a GPU, of any make, that could render."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/dev/dri").glob("renderD*"))


def _choose() -> str:
    """Try the backends in order of speed."""
    reasons = []
    software_egl = False
    gpu = has_gpu()
    for backend in ("egl", "osmesa") if gpu else ("osmesa", "egl"):
        try:
            name = renderer_name(backend)
        except RuntimeError as error:
            reasons.append(str(error))
            continue
        software = _in_software(name)
        if gpu and backend == "egl" and software:
            reasons.append(f"EGL renders in software ({name})")
            software_egl = True
            continue
        return _announce(backend, name, reasons if gpu and software else [])
    if software_egl:
        return _announce("egl", renderer_name("egl"), reasons)
    raise RenderingUnavailable(_missing(reasons))


def _in_software(renderer: str) -> bool:
    return renderer.lower().startswith(_SOFTWARE)


def _announce(backend: str, name: str, fallback_reasons: list[str]) -> str:
    logger.info("Rendering with %s: %s", backend, name)
    if fallback_reasons:
        warnings.warn(
            f"This machine has a GPU but LIBERO is rendered in software ({backend}, {name}), some twenty times slower: "
            f"{'; '.join(fallback_reasons)}. Install the GPU driver's EGL library (and libegl1), or set "
            "MUJOCO_GL=osmesa to accept it.",
            stacklevel=4,
        )
    return backend


def _missing(reasons: list[str]) -> str:
    return (
        "LIBERO needs OpenGL to render its cameras and none works here. Run `apt-get install libosmesa6` (as root, or "
        "with sudo) for rendering on the CPU; on a machine with a GPU, install libegl1 and the driver's EGL library "
        f"instead. What was tried: {'; '.join(reasons)}."
    )
