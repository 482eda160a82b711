from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchrl_vla.files import read_json, replacing_files, whole_file, whole_folder, write_json


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError, match="disk full"), whole_file(path) as partial:
        partial.write_text("{")
        raise RuntimeError("disk full")
    assert read_json(path) == {"old": 1}
    write_json(path, {"new": [2]})
    assert read_json(path) == {"new": [2]} and names(tmp_path) == ["a.json"]


def test_what_is_renamed_is_on_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after the rename must not leave an empty file of the right name."""
    synced: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def note_sync(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def check(source: object, target: object) -> None:
        assert str(Path(str(source)).resolve()) in synced
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", check)
    write_json(tmp_path / "a.json", {})
    with replacing_files(tmp_path / "b", lambda path: False) as partial:
        (partial / "b.txt").write_text("b")
    monkeypatch.setattr(Path, "rename", lambda self, target: (check(self, target), rename(Path(target), target))[1])
    with whole_folder(tmp_path / "c") as partial:
        (partial / "d").mkdir()
        (partial / "d" / "e.txt").write_text("e")
        inner = str(partial / "d" / "e.txt")
    assert inner in synced and names(tmp_path) == ["a.json", "b", "b/b.txt", "c", "c/d", "c/d/e.txt"]
    assert synced[-1] == str(tmp_path)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    for text in ("old", "new"):
        with whole_folder(folder) as partial:
            (partial / text).write_text(text)
        assert names(tmp_path) == ["policy", f"policy/{text}"]
    with pytest.raises(RuntimeError, match="disk full"), whole_folder(folder) as partial:
        (partial / "newer").write_text("")
        raise RuntimeError("disk full")
    assert names(tmp_path) == ["policy", "policy/new"]


def test_a_folder_survives_an_end_between_the_renames(tmp_path: Path) -> None:
    """The old one lies aside then, and comes back if the next writing fails."""
    (tmp_path / "policy.previous").mkdir()
    (tmp_path / "policy.previous" / "old").touch()
    (tmp_path / "policy.partial").mkdir()
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "policy"):
        raise RuntimeError
    assert names(tmp_path) == ["policy", "policy/old"]


def test_files_go_in_beside_others(tmp_path: Path) -> None:
    for name in ("mine.txt", "stale.bin", "same.bin"):
        (tmp_path / name).write_text("old")
    with replacing_files(tmp_path, lambda path: path.suffix == ".bin") as partial:
        (partial / "same.bin").write_text("new")
    assert names(tmp_path) == ["mine.txt", "same.bin"] and (tmp_path / "same.bin").read_text() == "new"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "holds a JSON list where an object is expected"),
        (None, "cannot be read .Is a directory"),
    ],
    ids=["cut", "bytes", "empty", "deep", "list", "folder"],
)
def test_damaged_json_is_told(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json {message}"):
        read_json(path)
