"""Demonstrations from the scripted expert, recorded in worker processes; interrupted collections go on."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from torchrl_vla.datasets import CorruptEpisodeError, DemonstrationDataset, DemonstrationIndex, read_episode
from torchrl_vla.demonstrations.expert.task_goals import PREDICATES, can_reach, read_goals
from torchrl_vla.demonstrations.record import DemonstrationOptions, Job, Report, run_worker
from torchrl_vla.envs.memory import available_memory, check_memory
from torchrl_vla.envs.processes import make_process
from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.envs.tasks import LiberoTask, TaskSuite, get_suite
from torchrl_vla.errors import UserError

__all__ = ["collect_demonstrations"]

_ATTEMPTS = 2
_MOST_ERRORS_BEFORE_SUCCESS = 3
#: Seconds between two looks at whether the collection should end.
_LOOK = 1.0


class _Worker:
    """A process with the job it works on."""

    def __init__(self, options: DemonstrationOptions, folder: Path) -> None:
        self.connection: Connection
        self.connection, theirs = multiprocessing.Pipe()
        self.process = make_process(run_worker, theirs, options, folder)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.task_id = -1
        self.deadline = float("inf")

    def start(self, job: Job, timeout: float) -> None:
        self.job, self.task_id = job, job.task_id
        self.deadline = time.monotonic() + timeout
        try:
            self.connection.send(job)
        except BrokenPipeError:
            pass  # it died idle; its pipe says so to whoever waits on it

    def report(self) -> Report | None:
        """Return the report of the job; None if the worker died of it."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Jobs:
    """Jobs by task. Each worker stays with its task while there is work, since a task's scene is costly to build."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._by_task: dict[int, deque[Job]] = {}
        for job in jobs:
            self._by_task.setdefault(job.task_id, deque()).append(job)

    def take(self, task_id: int, busy: Counter[int]) -> Job | None:
        """Return a job of this task, else of the task with most jobs left for each worker on it."""
        left = {task: len(jobs) for task, jobs in self._by_task.items() if jobs}
        if not left:
            return None
        if task_id not in left:
            task_id = max(left, key=lambda task: left[task] / (1 + busy[task]))
        return self._by_task[task_id].popleft()

    def put_back(self, job: Job) -> None:
        self._by_task[job.task_id].append(job)


def collect_demonstrations(
    out: Path,
    *,
    task_suite: str = "libero_spatial",
    episodes_per_task: int = 50,
    task_ids: Sequence[int] | None = None,
    init_state_ids: Sequence[int] | None = None,
    sampled_init_states: int | None = None,
    noise: float = 0.0,
    perturb_prob: float = 0.0,
    camera_size: int = 256,
    wrist_camera: bool = False,
    extra_steps: int = 8,
    num_workers: int | None = None,
    timeout: float = 600.0,
    seed: int = 0,
    versions: Mapping[str, str] | None = None,
    check: Callable[[], None] | None = None,
) -> DemonstrationIndex:
    """Let the expert solve tasks and keep the episodes in which it does.

    Every task is tried ``episodes_per_task`` times, from the initial states in turn; failed episodes are counted and
    not stored. Episodes that are there already are kept, so that an interrupted collection goes on, and a finished one
    can be given more episodes.

    Args:
        out: folder of the data set.

    Keyword Args:
        task_suite: name of the suite.
        episodes_per_task: episodes tried of each task.
        task_ids: tasks; None: all.
        init_state_ids: initial states; None: all.
        sampled_init_states: seed of as many initial states drawn from the tasks' regions; None: the official ones.
        noise: standard deviation of noise on every executed action. Labels stay clean.
        perturb_prob: share of episodes in which the arm is also pushed off its way a few times. Second visits to an
            initial state are all pushed if it is positive, since without they would repeat the first.
        camera_size: height and width of the frames in pixels.
        wrist_camera: record the wrist camera too.
        extra_steps: control steps recorded after success.
        num_workers: processes; None: one per core.
        timeout: seconds after which a worker that does not answer is replaced; its episode is tried once more.
        seed: of fixtures, noise and perturbations.
        versions: of the packages, noted in ``dataset.json``.
        check: called about once a second; may raise to end the collection, which can go on later.

    Returns:
        What is in the data set now.

    Raises:
        ValueError: an option is out of range, differs from those the data set was begun with, the expert cannot do a
            task, the workers need more memory than is available, or no episode succeeded.
        OSError: the disk is full; what was written stays readable, and the collection can go on.
        RuntimeError: workers end with errors before any episode was recorded.
    """
    suite = get_suite(task_suite)
    options = DemonstrationOptions(
        suite.name,
        camera_size,
        ("agentview", "robot0_eye_in_hand") if wrist_camera else ("agentview",),
        noise,
        extra_steps,
        seed,
        sampled_init_states,
    )
    _check_options(episodes_per_task, noise, perturb_prob, camera_size, extra_steps, num_workers, timeout)
    tasks = [suite.task(task_id) for task_id in (range(len(suite.tasks)) if task_ids is None else task_ids)]
    _check_goals(suite, tasks)
    plans = {}
    for task in tasks:
        states = _initial_states(init_state_ids, len(task.init_states), task.task_id)
        if episodes_per_task > len(states) and not noise and not perturb_prob:
            raise UserError(
                f"episodes_per_task={episodes_per_task} with {len(states)} initial states would record some episodes "
                "twice: lower it, or set perturb_prob or noise so that they differ."
            )
        plans[task.task_id] = _plan(task.task_id, states, episodes_per_task, perturb_prob, seed)
    backend = configure_rendering()
    settings = {**asdict(options), "cameras": list(options.cameras), "perturb_prob": perturb_prob,
                "init_state_ids": None if init_state_ids is None else list(init_state_ids)}  # fmt: skip
    index = _open(out, suite.name, settings)
    index.instructions |= {task.task_id: task.instruction for task in tasks}
    index.versions |= {**(versions or {}), "renderer": backend}
    jobs = [job for plan in plans.values() for job in plan if index.outcomes.get(job.name) not in ("success", "failed")]
    count = min(num_workers or len(os.sched_getaffinity(0)), len(jobs))
    if jobs:
        check_memory(count, count, 1, available_memory())
    out.mkdir(parents=True, exist_ok=True)
    index.save(out)
    tqdm.write(
        f"{len(jobs)} episodes to record, {sum(map(len, plans.values())) - len(jobs)} there already; {count} workers, "
        f"OpenGL through {backend}"
    )
    try:
        if jobs:
            _run(jobs, count, options, out, index, timeout, check)
    finally:
        index.save(out)
    DemonstrationDataset(out).update_statistics()
    return index


def _check_options(
    episodes: int, noise: float, perturb_prob: float, size: int, extra: int, workers: int | None, timeout: float
) -> None:
    for name, value, least in (
        ("episodes_per_task", episodes, 1),
        ("camera_size", size, 1),
        ("num_workers", 1 if workers is None else workers, 1),
        ("extra_steps", extra, 0),
        ("noise", noise, 0),
    ):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}.")
    if episodes > 10_000:
        raise UserError(f"episodes_per_task must be at most 10000, got {episodes}: names have four digits.")
    if timeout <= 0:
        raise UserError(f"timeout must be positive, got {timeout}.")
    if not 0.0 <= perturb_prob <= 1.0:
        raise UserError(f"perturb_prob must lie in [0, 1], got {perturb_prob}.")


def _check_goals(suite: TaskSuite, tasks: Sequence[LiberoTask]) -> None:
    able = [task.task_id for task in suite.tasks if task.bddl_file.is_file() and can_reach(read_goals(task.bddl_file))]
    unable = [task.task_id for task in tasks if task.task_id not in able]
    if unable:
        raise UserError(
            f"The scripted expert has no skill for what tasks {', '.join(map(str, unable))} of {suite.name} ask: it "
            f"knows {', '.join(PREDICATES)}. Leave them out. Those of the suite that it has skills for: "
            f"{','.join(map(str, able))}."
        )


def _initial_states(wanted: Sequence[int] | None, available: int, task_id: int) -> list[int]:
    states = list(range(available)) if wanted is None else list(wanted)
    bad = [state for state in states if not 0 <= state < available]
    if bad or not states:
        raise UserError(
            f"init_state_ids must name initial states of task {task_id}, 0..{available - 1}, got {bad or 'none'}."
        )
    return states


def _plan(task_id: int, states: list[int], episodes: int, perturb_prob: float, seed: int) -> list[Job]:
    jobs = []
    for number in range(episodes):
        name = DemonstrationIndex.episode_name(task_id, number)
        again = number >= len(states) and perturb_prob > 0
        perturbed = again or np.random.default_rng([seed, task_id, number]).random() < perturb_prob
        jobs.append(Job(name, task_id, states[number % len(states)], bool(perturbed)))
    return jobs


def _open(out: Path, suite_name: str, settings: dict) -> DemonstrationIndex:
    """Return the index of a new data set, or of the one to go on with, up to date with the episodes there are."""
    if not (out / "dataset.json").exists():
        return DemonstrationIndex(suite_name, {}, settings)
    index = DemonstrationIndex.load(out)
    for name, value in settings.items():
        if index.options.get(name) != value:
            raise UserError(
                f"{out} was begun with {name}={index.options.get(name)!r}, not {value!r}: use the same options to go "
                "on with it, or another folder."
            )
    episodes = out / "episodes"
    for leftover in episodes.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    index.outcomes = {name: outcome for name, outcome in index.outcomes.items() if outcome == "failed"}
    for path in sorted(episodes.glob("[0-9]*")):
        try:
            read_episode(path)
        except CorruptEpisodeError as error:
            tqdm.write(f"Recorded again, since it is damaged: {error}")
            shutil.rmtree(path)
        else:
            index.outcomes[path.name] = "success"
    return index


def _run(
    jobs: Sequence[Job],
    num_workers: int,
    options: DemonstrationOptions,
    out: Path,
    index: DemonstrationIndex,
    timeout: float,
    check: Callable[[], None] | None,
) -> None:
    queue, attempts, seconds = _Jobs(jobs), Counter[str](), Counter[str]()
    recorded, steps, errors = Counter[str](), 0, 0
    folder = out / "episodes"
    workers = [_Worker(options, folder) for _ in range(num_workers)]
    began = saved = time.monotonic()
    try:
        with tqdm(total=len(jobs), desc="demonstrations", unit="episode") as bar:
            _hand_out(workers, queue, timeout)
            while any(worker.job for worker in workers):
                if check is not None:
                    check()
                for worker in _answered(workers):
                    job = worker.job
                    assert job is not None
                    report = worker.report() if worker.connection.poll() else None
                    worker.job = None
                    if report is None:
                        reason = _end_of(worker, timeout)
                        workers[workers.index(worker)] = _Worker(options, folder)
                        attempts[job.name] += 1
                        tqdm.write(f"Episode {job.name}: {reason}")
                        if attempts[job.name] < _ATTEMPTS:
                            shutil.rmtree(folder / job.name, ignore_errors=True)
                            queue.put_back(job)
                            continue
                        report = Report(job, "error", 0, {}, reason)
                    if report.outcome == "refused":
                        raise UserError(f"task_ids must leave out task {job.task_id}: {report.error}")
                    if report.outcome == "full disk":
                        raise OSError(28, "the disk is full; the episodes written so far can be read", str(folder))
                    if report.outcome == "error":
                        errors += 1
                        index.outcomes[job.name] = f"dropped: {report.error.strip().splitlines()[-1]}"
                        tqdm.write(f"Episode {job.name} is dropped: {report.error.strip()}")
                        if errors >= _MOST_ERRORS_BEFORE_SUCCESS and not recorded:
                            raise RuntimeError(
                                f"{errors} episodes ended in errors and none was recorded. The last: {report.error}"
                            )
                    else:
                        index.outcomes[job.name] = report.outcome
                        recorded[report.outcome] += 1
                    steps += report.steps
                    seconds.update(report.seconds)
                    bar.update()
                    bar.set_postfix(success=recorded["success"], failed=recorded["failed"], dropped=errors)
                if time.monotonic() - saved > 10:
                    index.save(out)
                    saved = time.monotonic()
                _hand_out(workers, queue, timeout)
    finally:
        for worker in workers:
            worker.end()
    elapsed, total = time.monotonic() - began, sum(seconds.values()) or 1.0
    shares = ", ".join(f"{kind} {value / total:.0%}" for kind, value in seconds.most_common())
    tqdm.write(
        f"{steps:,} control steps in {elapsed:.1f} s ({steps / elapsed:.0f}/s); the workers' time went to {shares}, "
        f"and {max(0.0, 1 - total / (elapsed * num_workers)):.0%} to starting and waiting"
    )


def _hand_out(workers: Sequence[_Worker], queue: _Jobs, timeout: float) -> None:
    for worker in workers:
        if worker.job is None:
            busy = Counter(other.task_id for other in workers if other.job is not None)
            job = queue.take(worker.task_id, busy)
            if job is not None:
                worker.start(job, timeout)


def _answered(workers: Sequence[_Worker]) -> list[_Worker]:
    """Busy workers that have something to say, have died, or are overdue; waits until there is one."""
    busy = [worker for worker in workers if worker.job is not None]
    patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
    ready = wait([worker.connection for worker in busy], timeout=min(patience, _LOOK))
    return [worker for worker in busy if worker.connection in ready or time.monotonic() >= worker.deadline]


def _end_of(worker: _Worker, timeout: float) -> str:
    """End a worker that gave no report, and say why."""
    overdue = time.monotonic() >= worker.deadline
    if not overdue:
        worker.process.join(5.0)
    code = worker.process.exitcode
    worker.end()
    if overdue:
        return f"no answer within {timeout:g} s; the worker is replaced."
    hint = " (a full disk ends a process so)" if code == -7 else ""
    return f"the worker ended with code {code}{hint} and is replaced."
