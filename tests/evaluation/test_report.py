"""What an evaluation reports: rates, intervals, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from torchrl_vla.envs import get_suite
from torchrl_vla.evaluation.html import write_html
from torchrl_vla.evaluation.protocol import _executed, initial_states, spread_episodes
from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport, SuccessRate


def make_report() -> EvaluationReport:
    episodes = [
        EpisodeResult(task_id=3, init_state_id=0, success=True, control_steps=80, decisions=10),
        EpisodeResult(task_id=0, init_state_id=0, success=False, control_steps=220, decisions=28),
        EpisodeResult(task_id=3, init_state_id=1, success=True, control_steps=96, decisions=12),
    ]
    return EvaluationReport("libero_spatial", {0: "push", 3: "pick"}, episodes, seconds=6.0)


def test_wilson_interval_by_hand():
    """8 of 10: centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)."""
    z = 1.959964
    scale = 1 + z**2 / 10
    centre, half = (0.8 + z**2 / 20) / scale, z * (0.8 * 0.2 / 10 + z**2 / 400) ** 0.5 / scale
    assert SuccessRate(8, 10).interval == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert SuccessRate(0, 10).interval[0] == 0.0


def test_rates_per_task_and_in_all():
    report = make_report()
    assert (report.total.successes, report.total.episodes) == (2, 3)
    assert {task: result.success.rate for task, result in report.tasks.items()} == {0: 0.0, 3: 1.0}
    assert report.figures() == {
        "success_rate": pytest.approx(2 / 3),
        "mean_length": 132.0,
        "decisions_per_episode": pytest.approx(50 / 3),
        "seconds_per_episode": 2.0,
    }


def test_files_hold_every_episode(tmp_path: Path):
    make_report().save(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [e["control_steps"] for e in report["episodes"]] == [80, 220, 96]
    assert report["tasks"]["3"]["instruction"] == "pick"
    with (tmp_path / "out" / "episodes.csv").open(newline="") as stream:
        assert [row["success"] for row in csv.DictReader(stream)] == ["True", "False", "True"]


def test_episodes_are_spread_over_tasks_and_states():
    states = {4: [7, 8], 2: [9]}
    plan = spread_episodes([4, 2], states, 5, repeat=True)
    assert [(e.task_id, e.init_state_id) for e in plan] == [(4, 7), (2, 9), (4, 8), (2, 9), (4, 7)]
    plan = spread_episodes([4, 2], states, 5, repeat=False)
    assert [(e.task_id, e.init_state_id) for e in plan] == [(4, 7), (2, 9), (4, 8)]
    assert len(spread_episodes([4, 2], states, 2, repeat=False)) == 2


@pytest.mark.parametrize(
    ("greedy", "said"),
    [(False, "the intervals are for these states, not for others"), (True, "the intervals are too narrow")],
)
def test_states_that_were_run_again_are_said(greedy: bool, said: str, tmp_path: Path):
    report = make_report()
    report.settings["greedy"] = greedy
    assert report.caveat is None
    report.episodes = [*report.episodes, *report.episodes[1:], report.episodes[0], report.episodes[0]]
    assert str(report).splitlines()[-1].startswith("  3 initial states were run up to 3 times each, ")
    assert said in str(report)
    write_html(tmp_path / "report.html", report)
    assert said in (tmp_path / "report.html").read_text()


def test_initial_states_must_exist():
    suite = get_suite("libero_spatial")
    assert initial_states(suite, [0], None) == {0: list(range(50))}
    with pytest.raises(ValueError, match=r"Initial state 50 does not exist: task 0 of libero_spatial has 0\.\.49"):
        initial_states(suite, [0], [3, 50])


def test_actions_that_were_run_are_the_first_of_each_chunk():
    chunks = torch.arange(24.0).reshape(3, 4, 2)
    executed = _executed(chunks, torch.tensor([[4], [1], [2]]))
    assert executed.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [16, 17], [18, 19]]


def test_a_saved_report_loads(tmp_path: Path):
    report = make_report()
    report.save(tmp_path)
    loaded = EvaluationReport.load(tmp_path)
    assert (loaded.episodes, loaded.seconds, loaded.total) == (report.episodes, 6.0, report.total)
    assert loaded.instructions == {0: "push", 3: "pick"} and loaded.task_suite == "libero_spatial"
    assert (loaded.tasks[3].mean_length, loaded.tasks[3].decisions) == (88.0, 11.0)
