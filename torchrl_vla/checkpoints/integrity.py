"""Checksums of a folder's files: written once when the folder is whole, compared before anything is read from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torchrl_vla.files import flush_to_disk, read_json

__all__ = ["CHECKSUMS", "find_damage", "flush_to_disk", "write_checksums"]

#: In every folder that is verified: size in bytes and SHA-256 of each file, by its path in the folder.
CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Note size and SHA-256 of every file of a folder, and put all of it on the disk.

    Args:
        folder: complete otherwise, and not yet in the place where anyone reads it.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "weights").write_bytes(b"1234")
        >>> write_checksums(folder)
        >>> find_damage(folder)
        []
        >>> _ = (folder / "weights").write_bytes(b"1235")
        >>> find_damage(folder)
        ['weights has other bytes than were written']
    """
    noted = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in _files(folder)
    }
    (folder / CHECKSUMS).write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")
    for path in (*_files(folder), folder / CHECKSUMS, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        flush_to_disk(path)


def find_damage(folder: Path, *, complete: bool = True) -> list[str]:
    """Return what of a folder is not as it was written.

    Args:
        folder: with the note that :func:`write_checksums` made.
        complete: whether a file that is not noted is damage too; False for folders that users add files to.

    Returns:
        One clause per file that is missing, of another size, of other bytes, or not noted; empty for a whole folder.
    """
    if not (folder / CHECKSUMS).exists():
        return [f"{CHECKSUMS} is missing"]
    try:
        noted = read_json(folder / CHECKSUMS)
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in noted.items()}
    except (ValueError, KeyError, TypeError):
        return [f"{CHECKSUMS} cannot be read"]
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    strange = sorted(set(found) - set(expected)) if complete else []
    damage = [f"{name} was not written with the others" for name in strange]
    for name, (size, digest) in sorted(expected.items()):
        if name not in found:
            damage.append(f"{name} is missing")
        elif (actual := found[name].stat().st_size) != size:
            damage.append(f"{name} has {actual:,} of {size:,} bytes")
        elif _digest(found[name]) != digest:
            damage.append(f"{name} has other bytes than were written")
    return damage


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
