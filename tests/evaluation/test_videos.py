"""Films: files that decode to what was put in, and episodes that are filmed as they were run."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import av
import numpy as np
import pytest

from torchrl_vla.envs import processes
from torchrl_vla.envs.simulation import simulator
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport
from torchrl_vla.evaluation.videos import choose_episodes, film, write_mp4


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_film_decodes_to_its_frames(tmp_path: Path):
    colours = np.array([[200, 30, 40], [20, 180, 60], [30, 40, 210], [128, 128, 128], [250, 250, 250]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (5, 48, 64, 3)).copy()
    write_mp4(tmp_path / "new" / "film.mp4", frames)
    decoded = decode(tmp_path / "new" / "film.mp4")
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean((1, 2, 3)).max() < 6
    data = (tmp_path / "new" / "film.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    for bad in (frames[:0], frames[:, :47], frames[..., :1]):
        with pytest.raises(ValueError, match="even H and W and at least one"):
            write_mp4(tmp_path / "bad.mp4", bad)


def test_first_success_and_failure_of_each_task():
    outcomes = [(4, True), (0, False), (4, False), (0, False), (4, True), (0, True)]
    episodes = [EpisodeResult(task, index, success, 8, 1) for index, (task, success) in enumerate(outcomes)]
    assert choose_episodes(episodes) == [5, 1, 0, 2]
    assert choose_episodes(episodes, per_task=False) == [0, 1]
    assert choose_episodes(episodes[:1]) == [0]


@pytest.mark.simulator
@pytest.mark.processes
def test_an_episode_is_filmed_as_it_was_run():
    actions = np.zeros((10, 7), np.float32)
    actions[:, 0] = 0.8
    options = {"fidelity": "fast", "settle_steps": 1}
    episodes = [EpisodeResult(1, 2, False, 10, 2), EpisodeResult(1, 3, True, 10, 2)]
    report = EvaluationReport("libero_spatial", {1: "x"}, episodes, 1.0, {}, [actions, actions])
    with pytest.warns(UserWarning, match="no film of task 1 from initial state 3: run again it ended after 10 steps"):
        (video,) = film(report, [0, 1], image_size=32, **options)
    # Before the first step and after steps 4, 8 and 10.
    assert video.episode == episodes[0] and video.frames.shape == (4, 32, 32, 3)
    ours = LiberoSimulator("libero_spatial", image_size=32, **options)
    ours.reset(0, 1, 2)
    first = ours.render(0, "agentview")[::-1, ::-1]
    ours.step(0, actions)
    last = ours.render(0, "agentview")[::-1, ::-1]
    ours.close()
    np.testing.assert_array_equal(video.frames[0], first)
    np.testing.assert_array_equal(video.frames[-1], last)
    assert np.abs(last.astype(int) - first).max() > 50


@pytest.mark.simulator
@pytest.mark.processes
@pytest.mark.parametrize("grief", ["hangs", "dies", "fails"])
def test_what_keeps_a_film_from_being_drawn_costs_no_more_than_the_film(grief: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "prepare_processes", lambda: "fork")
    episodes = [EpisodeResult(1, state, False, 4, 1) for state in (2, 3, 4)]
    report = EvaluationReport("libero_spatial", {1: "x"}, episodes, 1.0, {}, [np.zeros((4, 7), np.float32)] * 3)

    class Simulator:
        def __init__(self, *arguments: object, **options: object) -> None:
            pass

        def reset(self, slot: int, task_id: int, init_state_id: int) -> None:
            if init_state_id == 3:
                {"hangs": lambda: time.sleep(60), "dies": lambda: os._exit(3), "fails": lambda: 1 / 0}[grief]()

        def step(self, slot: int, actions: np.ndarray) -> tuple[int, bool]:
            return len(actions), False

        def render(self, slot: int, camera: str) -> np.ndarray:
            return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(simulator, "LiberoSimulator", Simulator)
    reason = {"hangs": "more than 1.5 s", "dies": "exit code 3", "fails": "ZeroDivisionError: division"}[grief]
    with pytest.warns(UserWarning, match=f"no film of task 1 from initial state 3, nor of what follows: .*{reason}"):
        films = list(film(report, [0, 1, 2], timeout=1.5))
    assert [video.episode for video in films] == episodes[:1]
    assert not multiprocessing.active_children()
