"""`torchrl-vla demos` where it is told to end, or meets another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchrl_vla.cli import main
from torchrl_vla.datasets import DemonstrationIndex
from torchrl_vla.training.run_lock import lock_run

pytestmark = [pytest.mark.simulator, pytest.mark.processes]

#: The command, whose workers are stand-ins that touch no simulator.
COMMAND = """
import sys
sys.path.insert(0, sys.argv[1])
import scripted_workers
from torchrl_vla.demonstrations import collect
from torchrl_vla.envs import processes
from torchrl_vla.cli import main
processes.prepare_processes = lambda: "fork"
collect.run_worker = getattr(scripted_workers, sys.argv[2])
main(["demos", *sys.argv[3:]])
"""
WORKERS = Path(__file__).parents[1] / "demonstrations"


def start(worker: str, out: Path) -> subprocess.Popen:
    options = ["--out", str(out), "--task-ids", "0", "--episodes-per-task", "4", "--num-workers", "1"]
    command = [sys.executable, "-c", COMMAND, str(WORKERS), worker, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_recorded(tmp_path: Path, number: int) -> None:
    work, busy = start("slow_after_two", tmp_path), tmp_path / "busy"
    while not (busy.exists() and busy.read_text()):
        assert work.poll() is None, work.communicate()
        time.sleep(0.1)
    worker = int(busy.read_text())
    work.send_signal(number)
    said, errors = work.communicate(timeout=60)
    assert work.returncode == 128 + number and "Traceback" not in errors
    assert f"what was recorded is in {tmp_path}. To go on, repeat the command." in said
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert DemonstrationIndex.load(tmp_path).outcomes == {"000000": "success", "000001": "success"}
    again = start("reliable", tmp_path)
    assert "2 episodes to record, 2 there already" in "".join(again.communicate(timeout=120))
    assert again.returncode == 0 and len(DemonstrationIndex.load(tmp_path).outcomes) == 4


def test_a_second_process_in_the_folder_is_refused(tmp_path: Path) -> None:
    with lock_run(tmp_path), pytest.raises(SystemExit, match="Another process is recording in .* choose another --out"):
        main(["demos", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="task_id=99"):
        main(["demos", "--out", str(tmp_path / "out"), "--task-ids", "99"])
    assert not list(tmp_path.iterdir())
