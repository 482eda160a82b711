"""Reading and writing files, so that nobody ever meets half of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrl_vla.errors import UserError

__all__ = [
    "check_output_file",
    "check_output_folder",
    "flush_to_disk",
    "flush_tree",
    "read_json",
    "replacing_files",
    "write_json",
    "whole_file",
    "whole_folder",
]


def check_output_folder(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be written, before the work whose results are to go there. Nothing is left behind.

    Args:
        folder: made for a moment if it is not there.
        option: that names it, for the message.

    Raises:
        ValueError: it cannot be made, or nothing can be written in it.

    Examples:
        >>> check_output_folder(Path("/dev/null/a"), "--out")
        Traceback (most recent call last):
        ...
        torchrl_vla.errors.UserError: --out /dev/null/a cannot be written (Not a directory): choose another folder.
    """
    missing: list[Path] = []
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # the latter for a name with a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option} {folder} cannot be written ({reason}): choose another folder.") from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError, ValueError):
                path.rmdir()


def check_output_file(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before the work whose results are to go there.

    Args:
        path: the file; one that is there will be replaced.
        option: that names it, for the message.

    Raises:
        ValueError: it is a folder, or its folder cannot be written.
    """
    if path.is_dir() or not path.name:
        raise UserError(f"{option} {path} is a folder: name a file.")
    check_output_folder(path.parent, option)


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: the file.

    Raises:
        ValueError: it cannot be read, is damaged, or holds anything but an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): a JSON file is expected there.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): download or write it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__} where an object is expected: download it again.")
    return content


def write_json(path: Path, content: Any, *, indent: int = 2) -> None:
    """Write a JSON file as a whole.

    Args:
        path: the file, replaced if it is there.
        content: what JSON can hold; paths and the like become text.
        indent: spaces per level.
    """
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=indent, default=str) + "\n", encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, whose file takes its place once it is written and on disk.

    Args:
        path: the file to make or replace. If writing fails, it is left as it was.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "notes.txt")
        >>> with whole_file(path) as partial:
        ...     _ = partial.write_text("all of it")
        >>> path.read_text()
        'all of it'
    """
    # Not of `tempfile`, whose files nobody else may read; a name of its own, as others may write the same file.
    partial = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
        flush_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write in, which takes the place of another as a whole once everything is written and on disk.

    Args:
        folder: the one to make or replace. If writing fails, it is left as it was.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp(), "policy")
        >>> with whole_folder(folder) as partial:
        ...     _ = (partial / "a.txt").write_text("a")
        >>> [path.name for path in folder.parent.rglob("*")]
        ['policy', 'a.txt']
    """
    folder = folder.resolve()
    partial, previous = (folder.with_name(f"{folder.name}.{stage}") for stage in ("partial", "previous"))
    if previous.exists() and not folder.exists():  # the process before ended between the two renames below
        previous.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_tree(partial)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        partial.rename(folder)
        flush_to_disk(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing_files(folder: Path, stale: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a folder to write in, whose files then go into another one, beside what else lies there.

    Args:
        folder: made if it is not there. If writing fails, it is left as it was.
        stale: whether a file of it that was not written anew goes.
    """
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_tree(partial)
        written = sorted(path.name for path in partial.iterdir())
        for name in written:
            os.replace(partial / name, folder / name)
        for path in folder.iterdir():
            if path.is_file() and path.name not in written and stale(path):
                path.unlink()
        flush_to_disk(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Wait until a folder, with all files and folders in it, is on the disk.

    Args:
        folder: the one on top.
    """
    for path in (*folder.rglob("*"), folder):
        flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk, where a power cut leaves them.

    Args:
        path: the file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
