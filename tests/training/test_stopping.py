"""A signal lets the work at hand finish; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchrl_vla.training.stopping import Stopped, StopRequest

WORK = """
import sys, time
from torchrl_vla.training.stopping import StopRequest
with StopRequest("a second") as stop:
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        if sys.argv[1] == "polite":
            stop.check()
"""


def start(kind: str) -> subprocess.Popen:
    work = subprocess.Popen(
        [sys.executable, "-c", WORK, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert work.stdout.readline() == "ready\n"
    return work


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_exit_code_is_a_shells(number: int) -> None:
    work = start("polite")
    work.send_signal(number)
    _, said = work.communicate(timeout=60)
    assert work.returncode == 128 + number
    assert f"{signal.Signals(number).name}: finishing a second" in said and "Traceback" not in said


@pytest.mark.processes
def test_a_second_signal_ends_what_does_not_listen() -> None:
    work = start("deaf")
    work.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert work.poll() is None
    work.send_signal(signal.SIGINT)
    _, said = work.communicate(timeout=60)
    assert work.returncode == 128 + signal.SIGINT and "leaving at once" in said


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest("nothing") as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.processes
def test_a_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    from torchrl_vla.training.run_lock import lock_run

    code = (
        "import sys, time\nfrom pathlib import Path\nfrom torchrl_vla.training.run_lock import lock_run\n"
        "with lock_run(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="Another process is training in"), lock_run(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock_run(tmp_path):
        pass
