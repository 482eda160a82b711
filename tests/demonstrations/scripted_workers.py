"""Stand-ins for the worker process: they answer, die or hang by the episode's name, and write real episodes."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from torchrl_vla.datasets import Episode, write_episode
from torchrl_vla.demonstrations.record import DemonstrationOptions, Job, Report

STEPS = 3
# The shortest bytes that open and close as a JPEG does.
FRAME = b"\xff\xd8\xff\xd9"


def record(job: Job, folder: Path) -> Report:
    action = torch.zeros(STEPS, 7)
    images = {"image": [FRAME] * STEPS}
    episode = Episode(torch.zeros(STEPS, 8), action, action, images, job.task_id, job.init_state_id, "do it", 0)
    write_episode(folder / job.name, episode)
    return Report(job, "success", STEPS, {"simulate": 0.1})


def unreliable(connection: Connection, options: DemonstrationOptions, folder: Path) -> None:
    """000000 fails, 000001 kills its worker the first time, 000002 hangs, 000003 raises; the others succeed."""
    died = folder.parent / "died"
    while (job := connection.recv()) is not None:
        if job.name == "000000":
            connection.send(Report(job, "failed", 220, {}))
        elif job.name == "000001" and not died.exists():
            died.touch()
            os._exit(3)
        elif job.name == "000002":
            time.sleep(600)
        elif job.name == "000003":
            connection.send(Report(job, "error", 0, {}, "Traceback ...\nValueError: no grasp"))
        else:
            connection.send(record(job, folder))


def reliable(connection: Connection, options: DemonstrationOptions, folder: Path) -> None:
    """Every episode succeeds."""
    while (job := connection.recv()) is not None:
        connection.send(record(job, folder))


def slow_after_two(connection: Connection, options: DemonstrationOptions, folder: Path) -> None:
    """Two episodes succeed, and the third one takes long."""
    while (job := connection.recv()) is not None:
        if job.name == "000002":
            (folder.parent / "busy").write_text(str(os.getpid()))
            time.sleep(600)
        connection.send(record(job, folder))


def disk_full_at_second(connection: Connection, options: DemonstrationOptions, folder: Path) -> None:
    """The disk is full when the second episode is written."""
    while (job := connection.recv()) is not None:
        connection.send(record(job, folder) if job.name == "000000" else Report(job, "full disk", 0, {}))


def refusing(connection: Connection, options: DemonstrationOptions, folder: Path) -> None:
    """The expert cannot do the task."""
    while (job := connection.recv()) is not None:
        connection.send(Report(job, "refused", 0, {}, "the drawer is closed."))


def always_failing(connection: Connection, options: DemonstrationOptions, folder: Path) -> None:
    """No episode is solved."""
    while (job := connection.recv()) is not None:
        connection.send(Report(job, "failed", 220, {}))
