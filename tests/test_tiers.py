"""The fast tier has nothing in it that the others are for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import multiprocessing
import subprocess

import mujoco
import pytest
import torch


def test_nothing(): pass
def test_subprocess(): subprocess.run(["true"])
def test_swallowed():
    try:
        subprocess.run(["no such program"])
    except OSError:
        pass
def test_spawn(): multiprocessing.get_context("spawn").Process(target=print).start()
def test_model(): mujoco.MjModel.from_xml_string("<mujoco/>")
def test_compile():
    torch._dynamo.reset()
    torch.compile(torch.sin, backend="eager")(torch.ones(1))
@pytest.mark.processes
def test_marked(): subprocess.run(["true"])
"""


@pytest.mark.processes
def test_a_test_that_uses_more_than_it_is_marked_for_fails(tmp_path: Path) -> None:
    shutil.copyfile(Path(__file__).with_name("conftest.py"), tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    simulator\n    processes\n    compile\n    slow\n    fast\n"
    )
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_left_out.py").write_text(
        "import pytest\npytestmark = pytest.mark.simulator\nraise RuntimeError('is not even imported')\n"
    )
    command = [sys.executable, "-m", "pytest", "-m", "fast", "-rA", "-p", "no:cacheprovider", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path).stdout
    found = {name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED) \S+::test_(\w+)", printed, re.MULTILINE)}
    failing = dict.fromkeys(("subprocess", "swallowed", "spawn", "model", "compile"), "FAILED")
    assert found == {"nothing": "PASSED", **failing}, printed
    assert re.search(r"test_model needs simulator: mark it so", printed)
