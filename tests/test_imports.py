"""Imports go one way, and what has to start fast imports nothing heavy."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrl_vla

PACKAGE = Path(torchrl_vla.__file__).parent

#: The package's rooms, each group importing from groups further up only; rooms of one group know nothing of each other.
GROUPS = (
    {"errors"},
    {"files", "versions"},
    {"config"},
    {"envs", "modules", "objectives"},
    {"collectors", "checkpoints"},
    {"datasets", "distributed", "evaluation"},
    {"demonstrations", "training"},
    {"recipes"},
    {"bench"},
    {"commands"},
    {"cli"},
)


def _imports(file: Path) -> Iterator[str]:
    """Names that a file imports, with the package's own in full, at any depth of its code and for types alone too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = list(file.relative_to(PACKAGE.parent).parts[: -node.level]) if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "torchrl_vla")


def _imported_rooms(file: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(file) if "." in name}


def _imported_files(file: Path) -> set[Path]:
    """Files of the package that a file names; that the packages around them are imported too is left out."""
    found = set()
    for name in _imports(file):
        path = PACKAGE.parent.joinpath(*name.split("."))
        found |= {path.with_suffix(".py"), path / "__init__.py"}
        # `from torchrl_vla.modules import OpenVLA`: what __init__ has, unless it is a file of its own.
    return {path for path in found if path.is_file() and path != file}


def _rooms() -> set[str]:
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def _wrong(room: str, allowed: set[str]) -> set[str]:
    folder = PACKAGE / room
    return {
        f"{file.relative_to(PACKAGE)} imports {imported}"
        for file in (folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{room}.py"])
        for imported in _imported_rooms(file)
        if imported in _rooms() - allowed
    }


def test_every_room_has_its_place() -> None:
    assert _rooms() - {"__init__", "__main__"} == set().union(*GROUPS)


def test_the_table_of_rooms_is_that_of_the_folders() -> None:
    """A folder with its slash, a file with its ending, in an order in which imports go up only."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `torchrl_vla/(\w+(?:/|\.py))` \|", text, re.MULTILINE)
    there = {f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py" for room in _rooms() - {"__init__", "__main__"}}
    assert sorted(listed) == sorted(there)
    for number, name in enumerate(listed):
        room, *_ = re.split(r"[/.]", name)
        assert not _wrong(room, {room, *(re.split(r"[/.]", other)[0] for other in listed[:number])})


@pytest.mark.parametrize(("number", "group"), list(enumerate(GROUPS)))
def test_imports_go_one_way(number: int, group: set[str]) -> None:
    above = set().union(*GROUPS[:number])
    for room in group:
        assert not _wrong(room, above | {room})


def _circles(edges: dict[Path, set[Path]]) -> list[list[str]]:
    """Files that import each other, directly or through others."""

    def reached(start: Path) -> set[Path]:
        seen: set[Path] = set()
        waiting = [start]
        while waiting:
            for file in edges[waiting.pop()] - seen:
                seen.add(file)
                waiting.append(file)
        return seen

    reach = {file: reached(file) for file in edges}
    circles = {frozenset(other for other in reach[file] if file in reach[other]) for file in edges}
    return sorted(sorted(str(file.relative_to(PACKAGE)) for file in circle) for circle in circles if circle)


def test_no_files_import_each_other() -> None:
    """For types alone, or within a function, neither."""
    assert _circles({file: _imported_files(file) for file in PACKAGE.rglob("*.py")}) == []


def test_circles_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torchrl_vla"
    package.mkdir()
    (package / "a.py").write_text("from torchrl_vla.b import B")
    (package / "b.py").write_text("def f():\n    import torchrl_vla.c")
    (package / "c.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torchrl_vla import a")
    (package / "d.py").write_text("from torchrl_vla.a import A")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    edges = {file: _imported_files(file) for file in package.rglob("*.py")}
    assert _circles(edges) == [["a.py", "b.py", "c.py"]]


def test_relative_imports_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "torchrl_vla" / "envs" / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ..modules import heads\nfrom .. import objectives\nfrom . import tasks\nimport torchrl_vla.cli\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "torchrl_vla")
    assert {"modules", "objectives", "envs", "cli"} == _imported_rooms(file) - {"tasks"}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import torchrl_vla", {"mujoco", "OpenGL", "robosuite", "torch"}),
        ("import torchrl_vla.envs", {"mujoco", "OpenGL", "robosuite", "torch", "numba"}),
        ("from torchrl_vla.envs import LiberoEnv; LiberoEnv()", {"robosuite", "numba"}),
        (
            "import sys, torchrl_vla.cli as cli\nsys.argv = ['torchrl-vla', '--help']\n"
            "try:\n    cli.main()\nexcept SystemExit:\n    pass",
            {"mujoco", "OpenGL", "robosuite"},
        ),
    ],
    ids=["package", "envs", "LiberoEnv", "help"],
)
def test_light_imports(code: str, absent: set[str]) -> None:
    report = f"{code}\nimport sys; print('\\nloaded:', *sorted({absent!r} & set(sys.modules)), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines()[-1].strip() == "loaded:"
