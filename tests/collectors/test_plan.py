"""EpisodePlan: which episodes, in which order, again and again the same."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from torchrl_vla.collectors import Episode, EpisodePlan


def test_members_of_a_group_follow_each_other():
    plan = EpisodePlan([(4, 7), (4, 9), (4, 7)], group_size=2, first_group_id=10)
    assert list(plan) == [
        Episode(10, 4, 7),
        Episode(10, 4, 7),
        Episode(11, 4, 9),
        Episode(11, 4, 9),
        Episode(12, 4, 7),
        Episode(12, 4, 7),
    ]
    assert plan[-1] == Episode(12, 4, 7) and plan[1:3] == [Episode(10, 4, 7), Episode(11, 4, 9)]


def test_grid_is_tasks_by_states():
    plan = EpisodePlan.grid([2, 5], range(3))
    assert [(e.task_id, e.init_state_id) for e in plan] == [(2, 0), (2, 1), (2, 2), (5, 0), (5, 1), (5, 2)]
    assert [e.group_id for e in plan] == list(range(6))


def stream(seed: int = 0, first_plan: int = 0):
    return EpisodePlan.stream([0, 1, 2], range(4), groups=5, group_size=2, seed=seed, first_plan=first_plan)


def test_stream_is_even_over_tasks_and_states():
    plans = list(islice(stream(), 12))  # 60 groups: every one of the 12 starts five times
    groups = {e.group_id: (e.task_id, e.init_state_id) for plan in plans for e in plan}
    assert list(groups) == list(range(60))
    assert Counter(groups.values()) == {(task, state): 5 for task in range(3) for state in range(4)}
    first_round = [groups[i] for i in range(12)]
    assert len(set(first_round)) == 12  # no state of a task returns before all had their turn
    assert all({task for task, _ in first_round[i : i + 3]} == {0, 1, 2} for i in range(0, 12, 3))


def test_stream_depends_on_the_seed_and_can_be_resumed():
    plans = [list(plan) for plan in islice(stream(), 6)]
    assert [list(plan) for plan in islice(stream(), 6)] == plans
    assert [list(plan) for plan in islice(stream(seed=1), 6)] != plans
    assert [list(plan) for plan in islice(stream(first_plan=4), 2)] == plans[4:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpisodePlan([]), "at least one"),
        (lambda: EpisodePlan([(0, -1)]), "must not be negative"),
        (lambda: EpisodePlan([(0, 0)], group_size=0), "group_size=0"),
        (lambda: EpisodePlan.stream([0, 0], [0], groups=1, group_size=1, seed=0), r"task_ids=\[0, 0\]"),
        (lambda: EpisodePlan.stream([0], [], groups=1, group_size=1, seed=0), r"init_state_ids=\[\]"),
        (lambda: EpisodePlan.stream([0], [0], groups=0, group_size=1, seed=0), "groups=0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
