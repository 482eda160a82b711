"""What is recorded of an episode: labels are the expert's, though other actions are executed."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchrl_vla.demonstrations import collect, record
from torchrl_vla.demonstrations.expert.expert import ScriptedExpert
from torchrl_vla.demonstrations.expert.task_goals import UnreachableGoalError, read_goals
from torchrl_vla.demonstrations.record import DemonstrationOptions, Job, record_episode
from torchrl_vla.envs.proprio import axis_angle_state
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.envs.tasks import get_suite
from torchrl_vla.modules.openvla.jpeg import encode_jpeg

pytestmark = pytest.mark.simulator

SUITE = "libero_spatial"
CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, DemonstrationOptions]:
    """What a worker is told to do."""
    told: list[Any] = []
    monkeypatch.setattr(collect, "_run", lambda *given: told.extend(given))
    with pytest.raises(ValueError, match="nothing to learn from"):
        collect.collect_demonstrations(
            tmp_path,
            task_suite=SUITE,
            task_ids=[0],
            init_state_ids=[1],
            episodes_per_task=1,
            perturb_prob=1.0,
            noise=0.05,
            wrist_camera=True,
            camera_size=48,
        )
    [job], _, options, *_ = told
    return job, options


def test_a_pushed_episode_has_the_experts_labels_and_both_cameras(asked: tuple[Job, DemonstrationOptions]) -> None:
    job, options = asked
    simulator = LiberoSimulator(SUITE, image_size=48, cameras=options.cameras, picture_fidelity="fast")
    simulator.reset(0, 0, 1)
    expert = ScriptedExpert(simulator.model(0), read_goals(get_suite(SUITE).task(0).bddl_file))
    expert.reset(simulator.data(0))
    episode, steps = record_episode(simulator, expert, job, options, lambda kind: None)
    assert episode is not None and len(episode.action) == steps
    moved = (episode.executed_action - episode.action)[:, :6]
    # Noise is everywhere; a push is several times as large.
    assert moved.any(dim=-1).all() and moved.abs().max() > 0.3 > 6 * moved.abs().median()
    assert torch.equal(episode.executed_action[:, 6], episode.action[:, 6])
    assert {key: len(frames) for key, frames in episode.images.items()} == dict.fromkeys(CAMERAS, steps)
    simulator.reset(0, 0, 1)
    for key, camera in CAMERAS.items():
        upright = np.ascontiguousarray(simulator.render(0, camera)[::-1, ::-1])
        assert episode.images[key][0] == encode_jpeg(upright) and len(set(episode.images[key])) > steps // 2
    # The expert, led along the executed actions, says the labels.
    expert.reset(simulator.data(0))
    for step in range(20):
        np.testing.assert_allclose(axis_angle_state(simulator.low_dim(0)), episode.state[step], atol=1e-4)
        np.testing.assert_allclose(expert.action(), episode.action[step], atol=1e-3)
        simulator.step(0, episode.executed_action[step : step + 1].numpy())
    simulator.close()


@pytest.mark.parametrize(
    ("raised", "outcome"), [(UnreachableGoalError("a drawer"), "refused"), (ValueError("a defect"), "error")]
)
def test_a_defect_of_the_expert_is_no_refusal(
    asked: tuple[Job, DemonstrationOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: ValueError,
    outcome: str,
) -> None:
    def fail(*_: object) -> ScriptedExpert:
        raise raised

    job, options = asked
    monkeypatch.setattr(record, "ScriptedExpert", fail)
    for ours_to_keep in ("signal.signal", "torch.set_num_threads"):  # here it runs in this process
        monkeypatch.setattr(ours_to_keep, lambda *_: None)
    ours, theirs = multiprocessing.Pipe()
    ours.send(job)
    ours.send(None)
    with ours, theirs:
        record.run_worker(theirs, options, tmp_path)
        report = ours.recv()
    assert report.outcome == outcome and str(raised) in report.error
