"""Films of evaluated episodes: what was done is done again and drawn more often than the policy looked."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np

from torchrl_vla.envs.processes import make_process
from torchrl_vla.errors import UserError
from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport

__all__ = ["EpisodeVideo", "choose_episodes", "film", "write_mp4"]

#: Control steps (20 Hz) between two pictures, which are then shown at twice the speed of the episode.
STEPS_PER_FRAME = 4
FRAMES_PER_SECOND = 10
#: Of x264: pictures of 256 pixels come to some 25-100 kB per episode.
_QUALITY = "25"


@dataclass(frozen=True)
class EpisodeVideo:
    """A film of an episode.

    Args:
        episode: the episode.
        frames: uint8 ``[T, H, W, 3]``, upright, :data:`STEPS_PER_FRAME` control steps apart, the last one at the end.
    """

    episode: EpisodeResult
    frames: np.ndarray


def choose_episodes(episodes: Sequence[EpisodeResult], *, per_task: bool = True) -> list[int]:
    """Places of the first success and the first failure, of each task or of all.

    Args:
        episodes: what to choose from.
        per_task: one of each for every task; False: one of each in all.

    Examples:
        >>> runs = [EpisodeResult(task, 0, success, 80, 10) for task, success in ((1, True), (1, True), (0, False))]
        >>> choose_episodes(runs)
        [2, 0]
    """
    first: dict[tuple[int, bool], int] = {}
    for index, episode in enumerate(episodes):
        first.setdefault((episode.task_id if per_task else 0, not episode.success), index)
    return [first[key] for key in sorted(first)]


def film(
    report: EvaluationReport, chosen: Sequence[int], *, image_size: int = 256, timeout: float = 600.0, **options: Any
) -> Iterator[EpisodeVideo]:
    """Run episodes again, action by action, and film them through the agentview.

    A simulator gives the same bits for the same actions, so that is the episode that was judged. The pictures are
    those of ``fidelity="fast"``, whatever the policy saw. They are drawn in a process of their own, since a GPU
    driver's EGL is known to hang: a training or a report should not be lost to a film.

    Args:
        report: an evaluation that was just made: a loaded one has no actions.
        chosen: which of its episodes.
        image_size: height and width of the pictures in pixels, even.
        timeout: seconds that a film may take before the rest is given up.
        options: further arguments of :class:`~torchrl_vla.envs.simulation.simulator.LiberoSimulator`, those of the
            evaluation's environment: fidelity, seed, settle_steps, sampled_init_states.

    Yields:
        The films, without any of an episode that ends otherwise than it did; a warning names it, or says why the
        remaining ones cannot be drawn.
    """
    connection, theirs = multiprocessing.Pipe()
    jobs = [(report.episodes[index], report.actions[index]) for index in chosen]
    options |= {"image_size": image_size, "picture_fidelity": "fast", "max_models": 1}
    process = make_process(_draw, theirs, report.task_suite, jobs, options)
    process.start()
    theirs.close()
    try:
        for episode, _ in jobs:
            try:
                drawn = connection.recv() if connection.poll(timeout) else f"it took more than {timeout:g} s"
            except (EOFError, OSError):
                process.join()
                drawn = f"the process that draws ended with exit code {process.exitcode}"
            if isinstance(drawn, str):
                name = f"task {episode.task_id} from initial state {episode.init_state_id}"
                warnings.warn(f"There is no film of {name}, nor of what follows: {drawn}.", stacklevel=2)
                return
            frames, success, steps = drawn
            if (success, steps) != (episode.success, episode.control_steps):
                warnings.warn(
                    f"There is no film of task {episode.task_id} from initial state {episode.init_state_id}: run again "
                    f"it ended after {steps} steps with success={success}, and before after {episode.control_steps} "
                    f"with success={episode.success}. Film episodes with the options that they were evaluated with.",
                    stacklevel=2,
                )
                continue
            yield EpisodeVideo(episode, frames)
    finally:
        process.kill()
        process.join()
        connection.close()


def _draw(
    connection: Connection, task_suite: str, jobs: Sequence[tuple[EpisodeResult, np.ndarray]], options: dict[str, Any]
) -> None:
    """Send the frames of each episode, its success and its control steps; or in words why there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        # Not before now: it imports MuJoCo, which needs its OpenGL chosen.
        from torchrl_vla.envs.simulation.simulator import LiberoSimulator

        simulator = LiberoSimulator(task_suite, **options)
        for episode, actions in jobs:
            simulator.reset(0, episode.task_id, episode.init_state_id)
            frames, success, steps = [_picture(simulator)], False, 0
            for start in range(0, len(actions), STEPS_PER_FRAME):
                count, success = simulator.step(0, actions[start : start + STEPS_PER_FRAME])
                steps += count
                frames.append(_picture(simulator))
            connection.send((np.stack(frames), success, steps))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def _picture(simulator: Any) -> np.ndarray:
    return np.ascontiguousarray(simulator.render(0, "agentview")[::-1, ::-1])


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """Write pictures as an H.264 film that browsers play.

    Args:
        path: the file; its folder is made if it does not exist.
        frames: uint8 ``[T, H, W, 3]``, H and W even.

    Raises:
        ValueError: there is no picture, or it has an odd side.
    """
    if frames.ndim != 4 or not len(frames) or frames.shape[1] % 2 or frames.shape[2] % 2 or frames.shape[3] != 3:
        raise UserError(f"frames must be [T, H, W, 3] with even H and W and at least one, got {list(frames.shape)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # faststart puts the index first, so that players start before all of the film is there.
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": _QUALITY, "preset": "slow"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        # x264 would start a thread per core for pictures that one encodes at once.
        stream.codec_context.thread_count = 1
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
