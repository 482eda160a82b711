"""Figures, the report, fair timing, and the options of `torchrl-vla bench`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchrl_vla.bench import gpu_sections
from torchrl_vla.bench.measurements import Figure, Report
from torchrl_vla.bench.sim import SimulatorBench
from torchrl_vla.bench.timing import in_fresh_process, in_turns, one_core, resident_memory
from torchrl_vla.commands import bench
from torchrl_vla.config.presets import PRESETS


@pytest.mark.parametrize(
    ("figure", "ratio", "reached"),
    [
        (Figure("a", "ms", 2.0, 24.0, wanted_ratio=12), 12.0, True),
        (Figure("a", "ms", 2.0, 23.0, wanted_ratio=12), 11.5, False),
        (Figure("a", "steps/s", 90.0, 3.0, more_is_better=True, wanted_ratio=40), 30.0, False),
        (Figure("a", "MB", 30.0, 830.0, wanted=30.0), 830 / 30, True),
        (Figure("a", "steps/s", 1500.0, more_is_better=True, wanted=1600.0), None, False),
        (Figure("a", "s", 3.0), None, None),
    ],
)
def test_ratios_and_what_was_wanted(figure: Figure, ratio: float | None, reached: bool | None) -> None:
    assert figure.ratio == (None if ratio is None else pytest.approx(ratio)) and figure.reached is reached


def test_a_row_shows_all_of_a_figure() -> None:
    row = str(Figure.of_rounds("a step", "ms", [9.0, 1.0, 2.0], [1234.5, 30.0, 40.0], wanted_ratio=12.0))
    assert row.split() == ["a", "step", "2", "ms", "40", "ms", "20", "x", "12", "x", "reached"]


def test_the_file_is_up_to_date_after_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    report = Report("a bench", {"suite": "libero_goal"}, file)
    report.section("one core", "ours", "stock")
    for count in (1, 2):
        report.add(Figure(f"figure {count}", "ms", 1.0, 3.0, wanted_ratio=2.0))
        written = json.loads(file.read_text())
        assert [figure["name"] for figure in written["figures"]] == ["figure 1", "figure 2"][:count]
    assert written["figures"][0]["ratio"] == 3.0 and written["figures"][0]["reached"] is True
    assert written["settings"] == {"suite": "libero_goal"} and written["versions"]["mujoco"]
    assert int(written["machine"]["cores"]) == len(os.sched_getaffinity(0))
    shown = capsys.readouterr().out
    assert "suite: libero_goal" in shown and "figure 2" in shown
    with pytest.raises(ValueError, match="there is no folder"):
        Report("a bench", {}, tmp_path / "missing" / "figures.json")


def test_turns_alternate_and_the_first_does_not_count() -> None:
    calls: list[str] = []

    def side(name: str, values: list[float]):
        remaining = iter(values)

        def measure() -> float:
            calls.append(name)
            return next(remaining)

        return measure

    found = in_turns(
        {"ours": side("ours", [9, 1, 2]), "stock": side("stock", [99, 10, 20])}, 2, lambda: calls.append("")
    )
    assert found == {"ours": [1, 2], "stock": [10, 20]}
    assert calls == ["ours", "stock", ""] * 3


@pytest.mark.processes
def test_one_core_and_a_fresh_process() -> None:
    before = os.sched_getaffinity(0)
    with one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    assert in_fresh_process(os.getpid) != os.getpid()
    assert 10e6 < in_fresh_process(resident_memory) < resident_memory()


def test_options() -> None:
    cores = len(os.sched_getaffinity(0))
    quick = SimulatorBench(quick=True)
    assert (quick.rounds, quick.stock_resets, quick.num_workers, quick.num_envs) == (5, 1, sorted({1, cores}), [8])
    full = SimulatorBench(num_workers=[4, 2])
    assert (full.num_workers, full.num_envs, full.task_ids) == ([2, 4], [1, 4, 16, 64], [0])
    for wrong in ({"rounds": 0}, {"num_workers": [0]}, {"num_envs": [2, 2]}, {"task_ids": []}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} (must be|has duplicates|is empty)"):
            SimulatorBench(**wrong)


def test_an_unknown_task_is_refused_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="99"):
        bench.main(["sim", "--task-ids", "99"])
    assert capsys.readouterr().out == ""


def test_memory_is_measured_within_the_limit_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, tuple[Any, dict[str, Any]]] = {}

    def take(_: Any, __: int, name: str, wanted: Any, settings: dict[str, Any]) -> None:
        rows[name] = wanted, settings

    monkeypatch.setattr(gpu_sections, "_measure_update", take)
    monkeypatch.setattr(gpu_sections, "_compare_with_rollout", lambda _: None)
    bench: Any = SimpleNamespace(accelerate=lambda: None, num_decisions=64)
    gpu_sections.measure_update(bench)
    found = {name: (wanted.memory, settings.get("memory_gb")) for name, (wanted, settings) in rows.items()}
    for preset in ("80gb", "24gb"):
        limit = PRESETS[preset]().ppo.memory_gb
        assert found.pop(f"{preset} preset") == (limit, limit)
    [(name, (wanted, limit))] = found.items()
    assert name.endswith(f"memory_gb {limit:g}") and wanted == limit < PRESETS["24gb"]().ppo.memory_gb
