"""Imports go one way, and what has to start fast imports nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrl_vla

PACKAGE = Path(torchrl_vla.__file__).parent

#: The package's rooms, each group importing from groups further up only. Those of the first two groups know nothing of
#: each other.
GROUPS = (
    {"config"},
    {"envs", "modules", "objectives"},
    {"collectors", "checkpoints", "datasets"},
    {"demonstrations", "evaluation"},
    {"training"},
    {"recipes"},
    {"bench"},
    {"commands"},
    {"cli"},
)


def _imports(file: Path) -> Iterator[str]:
    """Rooms of the package that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = list(file.relative_to(PACKAGE.parent).parts[: -node.level]) if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (parts[1] for name in names if (parts := name.split("."))[0] == "torchrl_vla" and len(parts) > 1)


def _rooms() -> set[str]:
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def _wrong(room: str, allowed: set[str]) -> set[str]:
    folder = PACKAGE / room
    return {
        f"{file.relative_to(PACKAGE)} imports {imported}"
        for file in (folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{room}.py"])
        for imported in _imports(file)
        if imported in _rooms() - allowed
    }


def test_every_room_has_its_place() -> None:
    assert _rooms() - {"__init__", "__main__"} <= set().union(*GROUPS)


@pytest.mark.parametrize(("number", "group"), list(enumerate(GROUPS)))
def test_imports_go_one_way(number: int, group: set[str]) -> None:
    above = set().union(*GROUPS[:number])
    for room in group & _rooms():
        assert not _wrong(room, above | ({room} if number < 2 else group))


def test_relative_imports_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "torchrl_vla" / "envs" / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ..modules import heads\nfrom .. import objectives\nfrom . import tasks\nimport torchrl_vla.cli\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "torchrl_vla")
    assert {"modules", "objectives", "envs", "cli"} == set(_imports(file)) - {"tasks"}


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
