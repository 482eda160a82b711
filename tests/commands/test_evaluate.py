"""`torchrl-vla evaluate` where it differs from the standard case: another suite, other states, another head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchrl_vla.cli import main
from torchrl_vla.training.policy import build_policy, save_policy


def test_an_l1_policy_on_sampled_states_of_a_perturbed_suite(tmp_path: Path):
    """The policy has statistics of libero_spatial alone, and its folder says that it acts by the L1 head."""
    torch.manual_seed(0)
    save_policy(build_policy("tiny", use_l1_head=True), tmp_path / "policy")
    options = ["--task-suite", "libero_spatial_swap", "--task-ids", "5", "--episodes-per-task", "2", "--num-envs", "1"]
    options += ["--init-states", "sampled", "--seed", "3", "--max-episode-steps", "8", "--fidelity", "fast"]
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
    assert "sampled from the tasks&#x27; regions with seed 3, none of them official" in page and "<video" not in page


def test_base_openvla_decides_every_control_step(
    copy_release: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_release(tmp_path / "base")
    for head in folder.glob("*.pt"):
        head.unlink()
    options = ["--episodes-per-task", "1", "--num-envs", "1", "--max-episode-steps", "5", "--fidelity", "fast"]
    options += ["--task-ids", "2", "--no-videos", "--device", "cpu", "--temperature", "0.5"]
    main(["evaluate", "--checkpoint", str(folder), *options, "--out", str(tmp_path / "out")])
    assert "one after the other, one control step at a time: nothing of OpenVLA-OFT is in it" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["action_mode"] == "autoregressive" and report["settings"]["greedy"] is False
    (episode,) = report["episodes"]
    assert (episode["control_steps"], episode["decisions"]) == (5, 5)


def test_bad_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--checkpoint", "bundled:tiny", "--worker-timeout", "0"])
    assert end.value.code == 2 and "worker_timeout must be positive, got 0.0" in capsys.readouterr().err
