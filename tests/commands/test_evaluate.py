"""`torchrl-vla evaluate` where it differs from the standard case: another suite, other states, another head."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from torchrl_vla.checkpoints.policy import build_policy, save_policy
from torchrl_vla.cli import main
from torchrl_vla.collectors import Progress
from torchrl_vla.config import EvaluateConfig
from torchrl_vla.evaluation.report import EvaluationReport
from torchrl_vla.recipes import evaluate


@pytest.mark.simulator
def test_an_l1_policy_on_sampled_states_of_a_perturbed_suite(tmp_path: Path):
    """The policy has statistics of libero_spatial alone, and its folder says that it acts by the L1 head."""
    torch.manual_seed(0)
    save_policy(build_policy("tiny", use_l1_head=True), tmp_path / "policy")
    options = ["--task-suite", "libero_spatial_swap", "--task-ids", "5", "--episodes-per-task", "2", "--num-envs", "1"]
    options += ["--sampled-init-states", "3", "--max-episode-steps", "8", "--fidelity", "fast"]
    main(["evaluate", "--checkpoint", str(tmp_path / "policy"), *options, "--no-videos", "--out", str(tmp_path / "a")])
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    settings = report["settings"]
    assert (report["task_suite"], settings["action_mode"], settings["sampled_init_states"]) == (
        "libero_spatial_swap",
        "l1",
        3,
    )
    assert [(e["task_id"], e["init_state_id"], e["control_steps"]) for e in report["episodes"]] == [
        (5, 0, 8),
        (5, 1, 8),
    ]
    page = (tmp_path / "a" / "report.html").read_text()
    assert "sampled from the tasks&#x27; regions with seed 3, from the first on; none is official" in page
    assert "they are those of demos --sampled-init-states 3" in page and "<video" not in page


@pytest.mark.simulator
@pytest.mark.processes
def test_a_signal_keeps_the_episodes_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = ["--checkpoint", "random:tiny", "--task-ids", "0", "--episodes-per-task", "3", "--num-envs", "1"]
    options += ["--max-episode-steps", "8", "--fidelity", "fast", "--device", "cpu"]
    main(["evaluate", *options, "--no-videos", "--out", str(tmp_path / "whole")])
    out = tmp_path / "part"

    class Signalling(evaluate.EpisodeBar):
        def __call__(self, progress: Progress) -> None:
            super().__call__(progress)
            if progress.episodes == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(evaluate, "EpisodeBar", Signalling)
        main(["evaluate", *options, "--out", str(out)])
    assert ended.value.code == 143
    assert f"repeat the command with --resume --out {out}" in capsys.readouterr().out
    assert len(EvaluationReport.load(out).episodes) == 1 and not (out / "report.html").exists()
    with pytest.raises(SystemExit, match="holds a report already: choose another --out, or go on with it: --resume"):
        main(["evaluate", *options, "--out", str(out)])
    with pytest.raises(SystemExit, match="was begun otherwise.*horizon from 8 to 16 would change"):
        main(["evaluate", *options, "--max-episode-steps", "16", "--out", str(out), "--resume"])
    main(["evaluate", *options, "--out", str(out), "--resume"])
    assert "Going on after 1 episodes." in capsys.readouterr().out
    whole, resumed = (EvaluationReport.load(folder) for folder in (tmp_path / "whole", out))
    assert resumed.episodes == whole.episodes and len(resumed.episodes) == 3
    assert (out / "report.html").exists() and len(list((out / "videos").iterdir())) == 1
    with pytest.raises(SystemExit, match="holds a finished evaluation"):
        main(["evaluate", *options, "--out", str(out), "--resume"])


@pytest.mark.simulator
def test_base_openvla_decides_every_control_step(
    copy_release: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_release(tmp_path / "base")
    for head in folder.glob("*.pt"):
        head.unlink()
    options = ["--episodes-per-task", "2", "--num-envs", "1", "--max-episode-steps", "5", "--fidelity", "fast"]
    options += ["--init-state-ids", "4"]
    options += ["--task-ids", "2", "--no-videos", "--device", "cpu", "--temperature", "0.5"]
    main(["evaluate", "--checkpoint", str(folder), *options, "--out", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert "one after the other, one control step at a time: nothing of OpenVLA-OFT is in it" in output
    assert "1 initial states were run up to 2 times each, with actions sampled anew" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["action_mode"] == "autoregressive" and report["settings"]["greedy"] is False
    assert report["settings"]["episodes_per_task"] == 2 and report["caveat"] in output
    assert [(e["init_state_id"], e["control_steps"], e["decisions"]) for e in report["episodes"]] == [(4, 5, 5)] * 2


def planned(**options: object) -> list[tuple[int, int]]:
    config = EvaluateConfig("bundled:tiny", **options)  # type: ignore[arg-type]
    return [
        (e.task_id, e.init_state_id)
        for e in evaluate._plan(config, evaluate._acting(config, config.pretrained_checkpoint))
    ]


def test_no_initial_state_is_run_twice_greedily() -> None:
    assert planned(task_ids=[3]) == [(3, state) for state in range(50)]
    assert planned(task_ids=[3, 0], init_state_ids=[41, 40]) == [(3, 41), (0, 41), (3, 40), (0, 40)]
    assert planned(task_ids=[3], sampled_init_states=3, init_state_ids=[7], episodes_per_task=1) == [(3, 7)]
    for options in ({}, {"sampled_init_states": 3}, {"eval_temperature": 1.0, "action_mode": "l1"}):
        with pytest.raises(ValueError, match="episodes_per_task=3 is more than the 2 initial states of task 5.*to 2, "):
            planned(task_ids=[5], init_state_ids=[41, 40], episodes_per_task=3, **options)
    with pytest.raises(ValueError, match=r"51 is more than the 50 .*SEED\), or a --temperature above 0\."):
        planned(task_ids=[5], episodes_per_task=51)


def test_each_task_runs_its_own_states_where_they_are_not_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in some of LIBERO-PRO's suites."""
    monkeypatch.setattr(evaluate, "initial_states", lambda *_: {3: list(range(60)), 5: [7, 8, 9]})
    for temperature in (0.0, 1.0):
        plan = planned(task_ids=[3, 5], eval_temperature=temperature)
        assert [state for task, state in plan if task == 3] == list(range(50))
        assert [state for task, state in plan if task == 5] == [7, 8, 9]
    assert len(planned(task_ids=[3, 5], episodes_per_task=3)) == 6
    with pytest.raises(ValueError, match="episodes_per_task=4 is more than the 3 initial states of task 5"):
        planned(task_ids=[3, 5], episodes_per_task=4)
    assert len(planned(task_ids=[3, 5], episodes_per_task=4, eval_temperature=1.0)) == 8


def test_with_a_temperature_states_start_over() -> None:
    sampled = planned(task_ids=[5], init_state_ids=[41, 40], episodes_per_task=3, eval_temperature=1.0)
    assert sampled == [(5, 41), (5, 40), (5, 41)]
    assert len(planned(task_ids=[5], init_state_ids=[41, 40], eval_temperature=1.0)) == 2


def test_the_policy_to_compare_with_is_checked_before_anything_runs(tmp_path: Path) -> None:
    """The one acts by tokens, at a temperature; the other by the L1 head, which repeats itself."""
    torch.manual_seed(0)
    save_policy(build_policy("tiny", use_l1_head=True), tmp_path / "policy")
    options = ["--task-ids", "0", "--init-state-ids", "1", "--episodes-per-task", "2", "--temperature", "1"]
    with pytest.raises(SystemExit, match="episodes_per_task=2 is more than the 1 initial states of task 0"):
        main(["evaluate", "--checkpoint", "bundled:tiny", *options, "--compare-with", str(tmp_path / "policy"),
              "--out", str(tmp_path / "out")])  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("init_states", "drawn"),
    [
        (["--seed", "3"], {"seed": 3, "sampled_init_states": None}),
        (["--sampled-init-states", "3"], {"seed": 0, "sampled_init_states": 3}),
    ],
)
def test_every_choice_about_the_simulator_reaches_it(
    init_states: list[str], drawn: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_envs = Mock(side_effect=InterruptedError)
    monkeypatch.setattr("torchrl_vla.recipes.evaluate.make_envs", make_envs)
    chosen = [
        "--task-suite", "libero_goal", "--task-ids", "5", "2", "--episodes-per-task", "4", "--num-envs", "3",
        "--max-episode-steps", "16", "--proprio-format", "quaternion", "--num-images-in-input", "2",
        "--fidelity", "fast", "--worker-timeout", "7", *init_states,
    ]  # fmt: skip
    with pytest.raises(InterruptedError):
        main(["evaluate", "--checkpoint", "random:tiny", *chosen])
    make_envs.assert_called_once_with(
        "libero_goal", task_ids=[2, 5], num_envs=3, chunk_size=8, cameras=("agentview", "robot0_eye_in_hand"),
        proprio_format="quaternion", max_episode_steps=16, worker_timeout=7.0, fidelity="fast", **drawn,
    )  # fmt: skip


@pytest.mark.processes
def test_the_state_is_shown_as_the_policy_was_trained_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its folder notes, and a folder of an older version, which notes nothing, as released checkpoints were."""
    make_envs = Mock(side_effect=InterruptedError)
    monkeypatch.setattr("torchrl_vla.recipes.evaluate.make_envs", make_envs)
    policy = build_policy("tiny")
    for name, noted in (("older", None), ("quaternion", "quaternion")):
        policy.model.config = replace(policy.model.config, proprio_format=noted)
        save_policy(policy, tmp_path / name)
    for name, option, shown in (
        ("older", (), "axis_angle"),
        ("older", ("--proprio-format", "quaternion"), "quaternion"),
        ("quaternion", (), "quaternion"),
    ):
        with pytest.raises(InterruptedError):
            main(["evaluate", "--checkpoint", str(tmp_path / name), *option])
        assert make_envs.call_args.kwargs["proprio_format"] == shown
    with pytest.raises(SystemExit, match="is axis_angle, but .* with quaternion: use --proprio-format quaternion"):
        main(["evaluate", "--checkpoint", str(tmp_path / "quaternion"), "--proprio-format", "axis_angle"])


@pytest.mark.simulator
def test_the_checkpoint_to_compare_with_is_run_too_and_is_the_baseline(tmp_path: Path) -> None:
    options = ["--task-ids", "3", "--init-state-ids", "4", "--max-episode-steps", "8", "--num-envs", "1"]
    options += ["--fidelity", "fast", "--no-videos", "--compare-with", "random:tiny", "--out", str(tmp_path)]
    main(["evaluate", "--checkpoint", "bundled:tiny", *options])
    comparison = json.loads((tmp_path / "report.json").read_text())["comparison"]
    assert (comparison["baseline"], comparison["new"]) == ("random:tiny", "bundled:tiny")
    for name, folder in (("bundled:tiny", tmp_path), ("random:tiny", tmp_path / "baseline")):
        report = EvaluationReport.load(folder)
        assert report.settings["checkpoint"] == name
        assert [(e.task_id, e.init_state_id, e.control_steps) for e in report.episodes] == [(3, 4, 8)]
    assert "random:tiny" in (tmp_path / "report.html").read_text()


def test_the_states_that_demonstrations_may_have_shown_are_not_said_to_be_new(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "none is official, but they are those of `demos` with the same number" in text
    assert "trained on them" not in text


def test_bad_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--checkpoint", "bundled:tiny", "--worker-timeout", "0"])
    assert end.value.code == 2 and "worker_timeout must be positive, got 0.0" in capsys.readouterr().err
