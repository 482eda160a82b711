"""Processes that simulate: copies of one that has loaded the libraries already."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

from torchrl_vla.errors import UserError

__all__ = ["check_temporary_folder", "make_process", "prepare_processes"]

#: What takes seconds to load and is the same for all. MuJoCo is not: with EGL it opens the GPU's driver, which a copied
#: process cannot use.
_LOADED = ("torch", "tensordict", "numba", "scipy.spatial.transform")


#: Bytes of a socket's path on Linux, and those that multiprocessing adds to the temporary folder's.
_LONGEST_SOCKET, _ADDED = 107, len("/pymp-12345678/listener-12345678")


def check_temporary_folder() -> None:
    """Refuse a temporary folder in whose path the sockets between processes find no room.

    Raises:
        ValueError: its path is too long.
    """
    folder = tempfile.gettempdir()
    longest = _LONGEST_SOCKET - _ADDED
    if len(os.fsencode(folder)) > longest:
        raise UserError(
            f"the temporary folder {folder} has a path of {len(os.fsencode(folder))} bytes, and processes need sockets "
            f"in it, which allow {longest}: set TMPDIR to a shorter one, such as /tmp."
        )


def prepare_processes() -> str:
    """Begins to load, beside whatever this process does meanwhile, what :func:`make_process` will start from.

    The libraries are loaded once, in Python's fork server, which has no thread, no OpenGL and no CUDA that a copy could
    trip over; workers share their memory. Calling this early, or again, costs nothing.

    Returns:
        str: the start method of multiprocessing to use: ``"forkserver"``, or ``"spawn"`` where there is none.

    Examples:
        >>> prepare_processes() in multiprocessing.get_all_start_methods()
        True
    """
    check_temporary_folder()
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_LOADED))
    forkserver.ensure_running()
    return "forkserver"


def make_process(
    target: Callable[..., None],
    *arguments: Any,
    method: str | None = None,
    variables: Mapping[str, str] | None = None,
    **options: Any,
) -> BaseProcess:
    """Make a daemon, not started yet, with this process's environment of now (a fork server has that of its start).

    Args:
        target: what it runs; must be importable, as with ``spawn``.
        arguments: of the target.
        method: start method; None: :func:`prepare_processes`'.
        variables: of its environment, in addition.
        options: of the target, by name.
    """
    context = multiprocessing.get_context(prepare_processes() if method is None else method)
    environment = {**os.environ, **(variables or {})}
    make: Callable[..., BaseProcess] = context.Process  # type: ignore[attr-defined]
    return make(target=_run, args=(environment, target, arguments, options), daemon=True)


def _run(
    environment: Mapping[str, str],
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # Not above: the parent may do without. Copies would otherwise all draw the same numbers.
    import numpy as np

    np.random.seed()
    target(*arguments, **options)
