"""Compiling functions with numba so that a second process need not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numba

__all__ = ["compiled"]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles without the GIL and keeps the result on disk, where there is a folder to keep it in.

    What a compiled function calls should stand in its own file: numba compiles anew when that file changes, and looks
    at no other.

    Args:
        function: what numba can compile.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        warnings.warn(
            f"The compiled control loop cannot be kept on disk ({error}): every process spends some ten seconds on "
            "compiling it. Set NUMBA_CACHE_DIR to a folder that can be written.",
            stacklevel=1,  # one place for all functions, so that it is shown once
        )
        return numba.njit(nogil=True)(function)
