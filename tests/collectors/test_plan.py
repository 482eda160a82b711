"""EpisodePlan: which episodes, in which order, again and again the same."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from torchrl_vla.collectors import Episode, EpisodePlan


def test_members_of_a_group_follow_each_other():
    plan = EpisodePlan([(4, 7), (4, 9), (4, 7)], group_size=2, first_group_id=10)
    assert list(plan) == [
        Episode(10, 4, 7, 0),
        Episode(10, 4, 7, 1),
        Episode(11, 4, 9, 0),
        Episode(11, 4, 9, 1),
        Episode(12, 4, 7, 0),
        Episode(12, 4, 7, 1),
    ]
    assert plan[-1] == Episode(12, 4, 7, 1) and plan[1:3] == [Episode(10, 4, 7, 1), Episode(11, 4, 9, 0)]


def test_grid_is_tasks_by_states():
    plan = EpisodePlan.grid([2, 5], range(3))
    assert [(e.task_id, e.init_state_id) for e in plan] == [(2, 0), (2, 1), (2, 2), (5, 0), (5, 1), (5, 2)]
    assert [e.group_id for e in plan] == list(range(6))


def stream(seed: int = 0):
    return EpisodePlan.stream({task: range(4) for task in range(3)}, groups=5, group_size=2, seed=seed)


def test_stream_is_even_over_tasks_and_states():
    plans = list(islice(stream(), 12))  # 60 groups: every one of the 12 starts five times
    groups = {e.group_id: (e.task_id, e.init_state_id) for plan in plans for e in plan}
    assert list(groups) == list(range(60))
    assert Counter(groups.values()) == {(task, state): 5 for task in range(3) for state in range(4)}
    first_round = [groups[i] for i in range(12)]
    assert len(set(first_round)) == 12  # no state of a task returns before all had their turn
    assert all({task for task, _ in first_round[i : i + 3]} == {0, 1, 2} for i in range(0, 12, 3))


def test_stream_depends_on_the_seed():
    plans = [list(plan) for plan in islice(stream(), 6)]
    assert [list(plan) for plan in islice(stream(), 6)] == plans
    assert [list(plan) for plan in islice(stream(seed=1), 6)] != plans


def test_each_task_runs_through_its_own_initial_states():
    states = {3: [0, 1, 2, 3, 4], 8: [7], 9: [2, 40]}
    plans = islice(EpisodePlan.stream(states, groups=3, group_size=1, seed=0), 10)
    starts = Counter((e.task_id, e.init_state_id) for plan in plans for e in plan)
    assert starts == {(3, 0): 2, (3, 1): 2, (3, 2): 2, (3, 3): 2, (3, 4): 2, (8, 7): 10, (9, 2): 5, (9, 40): 5}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpisodePlan([]), "at least one"),
        (lambda: EpisodePlan([(0, -1)]), "must not be negative"),
        (lambda: EpisodePlan([(0, 0)], group_size=0), "group_size=0"),
        (lambda: EpisodePlan.stream({}, groups=1, group_size=1, seed=0), "init_states is empty"),
        (lambda: EpisodePlan.stream({4: [2, 2]}, groups=1, group_size=1, seed=0), r"of task 4 .* got \[2, 2\]"),
        (lambda: EpisodePlan.stream({0: [1], 4: []}, groups=1, group_size=1, seed=0), r"of task 4 .* got \[\]"),
        (lambda: EpisodePlan.stream({0: [0]}, groups=0, group_size=1, seed=0), "groups=0"),
        (lambda: EpisodePlan.stream({0: [0]}, groups=1, group_size=0, seed=0), "group_size=0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
