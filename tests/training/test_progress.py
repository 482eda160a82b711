"""How far a run has come: intervals, the best validation, and going on."""

from __future__ import annotations

import pytest
from tqdm import tqdm

from torchrl_vla.collectors import Progress
from torchrl_vla.training.progress import EpisodeBar, RunProgress


def test_an_interval_is_passed_once_however_large_the_updates_are():
    progress, passed = RunProgress(), []
    for env_steps in (30, 30, 30, 130, 10):
        progress.count(env_steps)
        passed.append(progress.passed(50))
    assert passed == [False, True, False, True, False]
    assert (progress.updates, progress.env_steps) == (5, 230)


def test_an_interval_of_zero_is_never_passed():
    progress = RunProgress()
    progress.count(100)
    assert progress.passed(1) and not progress.passed(0)


def test_the_best_is_strictly_better_than_all_before():
    progress = RunProgress()
    assert [progress.is_best(success) for success in (0.0, 0.4, 0.4, 0.3, 0.5)] == [True, True, False, False, True]
    assert progress.best_success == 0.5


def test_it_goes_on_from_where_it_was():
    first = RunProgress()
    first.count(90)
    first.is_best(0.7)
    resumed = RunProgress()
    resumed.load_state_dict(first.state_dict())
    assert resumed == first and not resumed.is_best(0.7)
    assert not resumed.passed(50), "what was passed before was dealt with before"
    resumed.count(30)
    assert resumed.passed(100) and not resumed.passed(50 * 3)


def test_the_bar_shows_a_collection_and_begins_anew(monkeypatch: pytest.MonkeyPatch):
    made: list[tqdm] = []

    def make(**options: object) -> tqdm:
        made.append(tqdm(**options))
        return made[-1]

    monkeypatch.setattr("torchrl_vla.training.progress.tqdm", make)
    bar = EpisodeBar("rollout")
    for episodes in (1, 2, 1, 2):
        bar(Progress(episodes=episodes, planned_episodes=2, decisions=3 * episodes, successes=1))
    assert [(each.n, each.total, each.disable) for each in made] == [(2, 2, True)] * 2 and len(made) == 2
