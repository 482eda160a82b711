"""One process at a time in a run's folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl_vla.errors import UserError

__all__ = ["lock_run"]


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the lock of a process that died is free.

    Args:
        folder: of the run.

    Raises:
        ValueError: another process holds it.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with lock_run(folder):
        ...     try:
        ...         with lock_run(folder):
        ...             pass
        ...     except ValueError:
        ...         print("taken")
        taken
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process is training in {folder}: wait until it ends, stop it, or choose another --run-dir."
            ) from error
        yield
