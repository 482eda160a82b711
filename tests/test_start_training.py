"""`scripts/start_training.sh`: a run in the background, with its log and process id beside its folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).parents[1] / "scripts" / "start_training.sh"
SMALL = [
    "--preset", "tiny", "--pretrained-checkpoint", "random:tiny", "--num-envs", "1", "--group-size", "2",
    "--max-episode-steps", "16", "--n-steps", "29", "--camera-size", "64", "--val-interval", "0", "--fidelity", "fast",
    "--settle-steps", "1", "--timesteps", "1000000", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def start(tmp_path: Path):
    """Calls the script in a folder that is not the repository, with this environment's torchrl-vla as the fallback."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(SCRIPT), *options]
        return subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
        )

    return call


def wait_for_the_end(pid_file: Path) -> None:
    """Of the process that holds the file's lock."""
    deadline = time.monotonic() + 60
    with pid_file.open() as file:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.1)
    raise TimeoutError(f"the process of {pid_file} did not end")


def test_a_run_goes_on_alone_and_is_started_once(start, tmp_path: Path) -> None:
    begun = start(*SMALL, "--run-dir", "runs/one")
    assert begun.returncode == 0, begun.stderr
    process = int((tmp_path / "runs" / "one.pid").read_text())
    try:
        assert f"Training in runs/one, process {process}. Watch it: tail -f runs/one.log" in begun.stdout
        assert "results in runs/one" in (tmp_path / "runs" / "one.log").read_text()
        assert (tmp_path / "runs" / "one" / "config.json").is_file()
        assert os.getsid(process) == process  # not of this terminal
        again = start(*SMALL, "--run_dir=runs/one/")
        assert again.returncode == 1 and f"is going on already (process {process})" in again.stderr
    finally:
        os.kill(process, signal.SIGTERM)
    wait_for_the_end(tmp_path / "runs" / "one.pid")
    # Its lock ended with it, so that the next start is the program's to judge.
    later = start(*SMALL, "--run-dir", "runs/one")
    assert later.returncode == 1 and "runs/one exists already" in later.stderr


def test_what_stops_at_once_is_shown_and_leaves_no_process_id(start, tmp_path: Path) -> None:
    wrong = start("--preset", "tiny", "--num-envs", "0", "--run-dir", "wrong")
    assert wrong.returncode == 1 and wrong.stderr.startswith("Training stopped at once. The end of wrong.log:")
    assert "num_envs must be positive, got 0" in wrong.stderr
    assert (tmp_path / "wrong.pid").read_text() == ""


def test_help_starts_nothing(start, tmp_path: Path) -> None:
    shown = start("--help")
    assert shown.returncode == 0 and "--run-dir" in shown.stdout
    assert not list(tmp_path.iterdir())
