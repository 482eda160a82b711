"""One process of `collect_demonstrations`: simulates, renders and writes the episodes it is told to."""

from __future__ import annotations

import functools
import signal
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from torchrl_vla.datasets.episodes import Episode, write_episode
from torchrl_vla.demonstrations.expert.expert import ScriptedExpert
from torchrl_vla.demonstrations.expert.perturbation import Perturbation
from torchrl_vla.demonstrations.expert.task_goals import UnreachableGoalError, read_goals
from torchrl_vla.envs.proprio import axis_angle_state
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.envs.tasks import get_suite
from torchrl_vla.modules.openvla.jpeg import encode_jpeg

__all__ = ["DemonstrationOptions", "Job", "Report", "record_episode", "run_worker"]

_OBSERVATION_KEYS = {"agentview": "image", "robot0_eye_in_hand": "wrist_image"}


@dataclass(frozen=True)
class DemonstrationOptions:
    """What all episodes of a data set have in common.

    Args:
        task_suite: name of the suite.
        camera_size: height and width of the frames in pixels.
        cameras: MuJoCo's names of the cameras.
        noise: standard deviation of noise on every executed action, gripper left out.
        extra_steps: control steps recorded after success.
        seed: of fixtures, noise and perturbations.
        sampled_init_states: seed of the initial states, drawn from the tasks' regions; None: the official ones.
    """

    task_suite: str
    camera_size: int
    cameras: tuple[str, ...]
    noise: float
    extra_steps: int
    seed: int
    sampled_init_states: int | None = None


class Job(NamedTuple):
    """An episode to record: its name, task and initial state, and whether it is pushed off its way."""

    name: str
    task_id: int
    init_state_id: int
    perturbed: bool


class Report(NamedTuple):
    """What became of a job, control steps, and seconds by kind of work.

    The outcome is ``success``, ``failed``, ``refused`` by the expert, which cannot do the task, ``full disk`` or
    ``error``.
    """

    job: Job
    outcome: str
    steps: int
    seconds: dict[str, float]
    error: str = ""


def record_episode(
    simulator: LiberoSimulator,
    expert: ScriptedExpert,
    job: Job,
    options: DemonstrationOptions,
    clock: Callable[[str], None],
) -> tuple[Episode | None, int]:
    """Let the expert solve a task from a state that the simulator's slot 0 was reset to.

    Args:
        simulator: renders every control step.
        expert: reset to the slot's data.
        job: the episode.
        options: of the data set.
        clock: called with a kind of work when it is done.

    Returns:
        The demonstration, None where the task was not solved within the suite's horizon, and the steps it took.
    """
    suite = get_suite(options.task_suite)
    pushes = {} if job.perturbed else {"push_probability": 0.0}
    perturb = Perturbation([options.seed, *job.name.encode()], noise=options.noise, **pushes)
    frames: dict[str, list[bytes]] = {camera: [] for camera in options.cameras}
    states, actions, executed = [], [], []
    succeeded, left = False, suite.horizon
    while left:
        states.append(axis_angle_state(simulator.low_dim(0)))
        for camera in options.cameras:
            # LIBERO renders upside down; policies see the frame turned by 180 degrees.
            upright = np.ascontiguousarray(simulator.render(0, camera)[::-1, ::-1])
            clock("render")
            frames[camera].append(encode_jpeg(upright))
            clock("encode")
        actions.append(expert.action())
        executed.append(perturb(actions[-1]))
        clock("expert")
        _, success = simulator.step(0, executed[-1][None])
        clock("simulate")
        left -= 1
        if success and not succeeded:
            succeeded, left = True, options.extra_steps
    if not succeeded:
        return None, len(actions)
    episode = Episode(
        state=torch.from_numpy(np.stack(states)).float(),
        action=torch.from_numpy(np.stack(actions)).float(),
        executed_action=torch.from_numpy(np.stack(executed)).float(),
        images={_OBSERVATION_KEYS[camera]: encoded for camera, encoded in frames.items()},
        task_id=job.task_id,
        init_state_id=job.init_state_id,
        instruction=suite.task(job.task_id).instruction,
        seed=options.seed,
    )
    return episode, len(actions)


def run_worker(connection: Connection, options: DemonstrationOptions, folder: Path) -> None:
    """Record the episodes that come through a pipe until None comes.

    Args:
        connection: gives jobs, takes a report for each.
        options: of the data set.
        folder: of the episodes.
    """
    # What asks a collection to end often reaches all its processes: the parent ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    simulator = LiberoSimulator(
        options.task_suite,
        image_size=options.camera_size,
        cameras=options.cameras,
        seed=options.seed,
        sampled_init_states=options.sampled_init_states,
        max_models=1,  # 0.4 to 1.1 GB each, and jobs come task by task
    )

    @functools.lru_cache(maxsize=1)  # each holds its task's model
    def expert_of(task_id: int) -> ScriptedExpert:
        goals = read_goals(get_suite(options.task_suite).task(task_id).bddl_file)
        return ScriptedExpert(simulator.model(0), goals)

    try:
        while (job := connection.recv()) is not None:
            connection.send(_work(simulator, expert_of, job, options, folder))
    except EOFError:
        pass  # the parent is gone
    finally:
        simulator.close()


def _work(
    simulator: LiberoSimulator,
    expert_of: Callable[[int], ScriptedExpert],
    job: Job,
    options: DemonstrationOptions,
    folder: Path,
) -> Report:
    seconds: defaultdict[str, float] = defaultdict(float)
    last = time.perf_counter()

    def clock(kind: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[kind] += now - last
        last = now

    try:
        simulator.reset(0, job.task_id, job.init_state_id)
        try:
            expert = expert_of(job.task_id)
            expert.reset(simulator.data(0))
        except UnreachableGoalError as error:
            return Report(job, "refused", 0, dict(seconds), str(error))
        clock("reset")
        episode, steps = record_episode(simulator, expert, job, options, clock)
        if episode is not None:
            write_episode(folder / job.name, episode)
        clock("write")
    except Exception as error:  # the parent decides what an error of one episode means for the others
        kind = "full disk" if isinstance(error, OSError) and error.errno == 28 else "error"
        return Report(job, kind, 0, dict(seconds), traceback.format_exc())
    return Report(job, "failed" if episode is None else "success", steps, dict(seconds))
