"""One process at a time in a folder that results are written to."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl_vla.errors import UserError

__all__ = ["lock_run"]


@contextmanager
def lock_run(folder: Path, *, work: str = "training", option: str = "--run-dir") -> Iterator[None]:
    """Hold a folder for this process; the lock of a process that died is free.

    Args:
        folder: where the results go; made if it is not there, and taken away again if nothing was written in it.
        work: what is done there, for the message.
        option: that names the folder, for the message.

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
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process is {work} in {folder}: wait until it ends, stop it, or choose another {option}."
            ) from error
        try:
            yield
        finally:
            if made and list(folder.iterdir()) == [path]:
                path.unlink()
                with contextlib.suppress(OSError):  # another process has come meanwhile
                    folder.rmdir()
