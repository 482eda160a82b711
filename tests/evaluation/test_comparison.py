"""Two evaluations on the same initial states, against figures computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from torchrl_vla.cli import main
from torchrl_vla.evaluation.comparison import PairedOutcomes, compare
from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport


def make_report(outcomes: list[tuple[int, int, bool]], suite: str = "libero_spatial", **settings) -> EvaluationReport:
    episodes = [EpisodeResult(task, state, success, 80, 10) for task, state, success in outcomes]
    return EvaluationReport(suite, {0: "push", 1: "pick"}, episodes, 4.0, {"horizon": 220, **settings})


def test_mcnemar_by_hand():
    """Ten pairs differ, nine of them for the better: (C(10,0) + C(10,1)) / 2^10 in each tail."""
    outcomes = PairedOutcomes(both=50, gained=9, lost=1, neither=40)
    assert outcomes.p_value == pytest.approx(2 * (1 + 10) / 1024)
    assert PairedOutcomes(both=3, gained=1, lost=9, neither=0).p_value == pytest.approx(22 / 1024)
    assert PairedOutcomes(both=3, gained=0, lost=0, neither=4).p_value == 1.0
    assert PairedOutcomes(both=0, gained=3, lost=3, neither=0).p_value == 1.0


def test_difference_and_interval_by_hand():
    outcomes = PairedOutcomes(both=50, gained=9, lost=1, neither=40)
    assert (str(outcomes.baseline), str(outcomes.new)) == (
        "51.0% [41.3, 60.6] (51/100)",
        "59.0% [49.2, 68.1] (59/100)",
    )
    assert outcomes.difference == pytest.approx(0.08)
    # Bonett and Price: (9+1)/(100+2) and (1+1)/(100+2) in place of 9/100 and 1/100.
    gained, lost = 10 / 102, 2 / 102
    half = 1.959964 * math.sqrt((gained + lost - (gained - lost) ** 2) / 102)
    assert outcomes.interval == pytest.approx((gained - lost - half, gained - lost + half), abs=1e-6)
    assert PairedOutcomes(both=0, gained=2, lost=0, neither=0).interval[1] == 1.0


def test_episodes_are_paired_by_task_state_and_repetition():
    baseline = make_report([(0, 5, True), (0, 6, False), (1, 5, False), (0, 5, False), (1, 9, True)])
    new = make_report([(1, 5, True), (0, 5, False), (0, 5, True), (0, 6, True)])
    comparison = compare(baseline, new)
    # Task 0: 5 first time True -> False, second time False -> True, 6 False -> True. Task 1: 5 False -> True.
    assert comparison.tasks == {
        0: PairedOutcomes(both=0, gained=2, lost=1, neither=0),
        1: PairedOutcomes(both=0, gained=1, lost=0, neither=0),
    }
    assert comparison.total == PairedOutcomes(both=0, gained=3, lost=1, neither=0)
    assert comparison.unpaired == 1 and "1 episodes are left out: only one of the two" in str(comparison)


def test_greedy_repeats_are_not_pairs_of_their_own():
    """Both states were lost; five times each they would be ten losses, p = 0.002."""
    baseline = make_report([(0, 5, True), (0, 6, True)] * 5, greedy=True)
    new = make_report([(0, 5, False), (0, 6, False)] * 5, greedy=True)
    comparison = compare(baseline, new)
    assert comparison.total == PairedOutcomes(both=0, gained=0, lost=2, neither=0)
    assert comparison.total.p_value == 0.5 and comparison.unpaired == 16
    sampled = make_report([(0, 5, True), (0, 6, True)] * 5, greedy=False)
    assert compare(sampled, make_report([(0, 5, False)] * 5, greedy=False)).total.lost == 5
    assert (compare(sampled, new).total.lost, compare(sampled, new).unpaired) == (2, 16)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_report([(0, 5, True)], "libero_goal"), "are of libero_goal and libero_spatial"),
        (make_report([(0, 5, True)], horizon=100), r"differ in horizon \(100 and 220\)"),
        (make_report([(0, 5, True)], sampled_init_states=1), r"differ in sampled_init_states \(1 and None\)"),
        (make_report([(0, 6, True), (1, 5, True)]), "share no initial state"),
    ],
)
def test_different_problems_are_not_compared(other: EvaluationReport, message: str):
    with pytest.raises(ValueError, match=message):
        compare(other, make_report([(0, 5, True)]))


def test_finished_evaluations_are_compared_without_running_anything(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_report([(0, 0, False), (0, 1, True)], checkpoint="before").save(tmp_path / "a")
    make_report([(0, 0, True), (0, 1, True)], checkpoint="<after>").save(tmp_path / "b")
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "report.json"), "--out", str(tmp_path / "c")])
    output = capsys.readouterr().out
    assert "<after> against before, the same 2 initial states" in output and "gained 1, lost 0" in output
    figures = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert (figures["gained"], figures["lost"], figures["both"], figures["mcnemar_p"]) == (1, 0, 1, 1.0)
    assert figures["tasks"]["0"]["difference"] == 0.5
    assert "&lt;after&gt;" in (tmp_path / "c" / "comparison.html").read_text()
    with pytest.raises(SystemExit, match="holds a comparison already"):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")])
    with pytest.raises(SystemExit, match="holds no report.json"):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "nowhere")])
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit, match="other.json is not a report that torchrl-vla evaluate wrote"):
        main(["compare", str(tmp_path / "other.json"), str(tmp_path / "b")])


def test_what_is_compared_with_is_checked_before_anything_runs(tmp_path: Path):
    make_report([(0, 0, True)]).save(tmp_path / "a")
    options = ["evaluate", "--checkpoint", "bundled:tiny", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"differ in fixture_seed \(None and 0\)|differ in fidelity"):
        main([*options, "--compare-with", str(tmp_path / "a")])
    settings = {"sampled_init_states": None, "fixture_seed": 0, "fidelity": "exact"}
    make_report([(0, 7, True)], **settings).save(tmp_path / "b")
    with pytest.raises(SystemExit, match="has no episode from any of these tasks and initial states"):
        main([*options, "--init-state-ids", "8", "--compare-with", str(tmp_path / "b")])
    with pytest.raises(SystemExit, match="there is no checkpoint folder './nowhere'"):
        main([*options, "--compare-with", "./nowhere"])
    assert not (tmp_path / "out").exists()
