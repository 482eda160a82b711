"""Processes that simulate start from loaded libraries, and still with the environment and the chance of their own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from torchrl_vla.envs.processes import check_temporary_folder, make_process, prepare_processes

pytestmark = pytest.mark.processes


def describe(connection: Connection, *, names: list[str]) -> None:
    loaded = {name for name in ("torch", "tensordict", "numba", "mujoco", "OpenGL") if name in sys.modules}
    connection.send(({name: os.environ.get(name) for name in names}, loaded, float(np.random.rand())))


def ask(names: list[str], **options: str | dict[str, str]) -> tuple[dict[str, str | None], set[str], float]:
    ours, theirs = multiprocessing.Pipe()
    process = make_process(describe, theirs, names=names, **options)
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    assert process.exitcode == 0 and process.daemon
    return answer


def test_what_takes_long_is_loaded_once_and_no_driver_is() -> None:
    assert ask([])[1] == {"torch", "tensordict", "numba"}


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_the_environment_is_that_of_now(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_processes()  # with a PATH
    monkeypatch.delenv("PATH")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    seen, _, _ = ask(["PATH", "MUJOCO_GL", "ITS_OWN"], method=method, variables={"ITS_OWN": "3"})
    assert seen == {"PATH": None, "MUJOCO_GL": "egl", "ITS_OWN": "3"}
    assert "ITS_OWN" not in os.environ


def test_copies_do_not_draw_the_same_numbers() -> None:
    assert len({ask([])[2] for _ in range(3)}) == 3


def test_where_python_cannot_copy_processes_they_start_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert prepare_processes() == "spawn"


@pytest.mark.parametrize(("length", "fits"), [(75, True), (76, False)])
def test_a_temporary_folder_without_room_for_sockets_is_refused(
    length: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sockets themselves are: an address of 108 bytes is none."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short, "t" * (length - len(short) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        address = f"{folder}/pymp-12345678/listener-12345678"
        assert (len(address) <= 107) is fits
        if fits:
            check_temporary_folder()
        else:
            with pytest.raises(ValueError, match="path of 76 bytes, .* allow 75: set TMPDIR to a shorter one"):
                prepare_processes()
