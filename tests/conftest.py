"""What tests of several folders start from, and what keeps the tiers of the tests true."""

from __future__ import annotations

import ast
import gc
import multiprocessing.process
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Simulating processes share the cores: one thread each. Here, before torch is imported, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(__file__).parent / "data"

#: Marks of what a test needs. A test without any belongs to the fast tier, `pytest -m fast`.
NEEDS = ("simulator", "processes", "compile", "slow")

#: What the test that runs now has used without being marked for it.
_unmarked: set[str] = set()


def _note(need: str) -> None:
    _unmarked.add(need)


def _watch_processes() -> None:
    """Note every process that is started, by whichever library."""
    sys.addaudithook(lambda event, _: _note("processes") if event in ("subprocess.Popen", "os.fork") else None)
    start = multiprocessing.process.BaseProcess.start

    def noted(process: multiprocessing.process.BaseProcess) -> None:
        _note("processes")  # the start method "spawn" has no audit event
        start(process)

    multiprocessing.process.BaseProcess.start = noted  # type: ignore[method-assign]


def _watch_simulator() -> None:
    """Note every model that MuJoCo makes; to import it costs little, and TorchRL does."""
    import mujoco

    def noted(make: Callable[..., Any]) -> staticmethod:
        def made(*args: Any, **kwargs: Any) -> Any:
            _note("simulator")
            return make(*args, **kwargs)

        return staticmethod(made)

    for name in ("from_xml_string", "from_xml_path", "from_binary_path"):
        setattr(mujoco.MjModel, name, noted(getattr(mujoco.MjModel, name)))


def _watch_compiler() -> None:
    """Note every piece of code that torch.compile translates."""
    from torch._dynamo.callback import callback_handler

    clear = callback_handler.clear

    def watch() -> None:
        clear()  # `torch._dynamo.reset` does that
        callback_handler.register_start_callback(lambda _: _note("compile"))

    callback_handler.clear = watch  # type: ignore[method-assign]
    watch()


def pytest_configure() -> None:
    _watch_processes()
    _watch_simulator()
    _watch_compiler()


def _marks_of_all_tests(file: Path) -> set[str]:
    """Names of the marks that a module gives to all its tests by `pytestmark`, without importing it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "pytestmark":
            return {part.attr for part in ast.walk(node.value) if isinstance(part, ast.Attribute)}
    return set()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out, before its imports, a module that has nothing for the fast tier."""
    fast = config.option.markexpr == "fast" and collection_path.suffix == ".py"
    return True if fast and _marks_of_all_tests(collection_path) & set(NEEDS) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(DATA.parent) and not any(map(item.get_closest_marker, (*NEEDS, "full"))):
            item.add_marker("fast")


def pytest_collection_finish() -> None:
    gc.freeze()  # the libraries stay anyway; code that collects garbage on purpose need not look through them each time


def pytest_runtest_setup() -> None:
    _unmarked.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a test of the fast tier that has used what the other tiers are for, however it ended."""
    report = yield
    if _unmarked and item.get_closest_marker("fast"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} needs {', '.join(sorted(_unmarked))}: mark it so (CONTRIBUTING.md)."
    _unmarked.clear()
    return report


@pytest.fixture(scope="session")
def copy_release() -> Callable[[Path], Path]:
    """Copies upstream's tiny checkpoint, with L1 head, proprio projector and tokenizer, to a folder and returns it."""

    def copy(folder: Path) -> Path:
        shutil.copytree(DATA / "openvla" / "checkpoint", folder, copy_function=shutil.copyfile)
        for file in (DATA / "llama_tokenizer").iterdir():
            shutil.copyfile(file, folder / file.name)
        return folder

    return copy


@pytest.fixture
def model() -> object:
    from small_openvla import random_model

    return random_model()


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Upstream's tiny checkpoint."""
    return DATA / "openvla" / "checkpoint"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Upstream's inputs, intermediates and outputs by file."""
    from safetensors.torch import load_file

    return lambda name: load_file(DATA / "openvla" / f"{name}.safetensors")
