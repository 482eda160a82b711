"""Which task and initial state an episode runs."""

from collections.abc import Sequence

import pytest

from torchrl_vla.envs.schedule import EpisodeSchedule
from torchrl_vla.envs.tasks import get_suite


def _schedule(task_ids: Sequence[int], **options: object) -> EpisodeSchedule:
    return EpisodeSchedule(get_suite("libero_spatial"), task_ids, **options)


def test_cycle_takes_tasks_in_turn_and_each_tasks_states_in_turn() -> None:
    schedule = _schedule([4, 2], init_state_id=48)
    assert [schedule.next() for _ in range(7)] == [(4, 48), (2, 48), (4, 49), (2, 49), (4, 0), (2, 0), (4, 1)]
    schedule.set_seed(0)
    assert schedule.next() == (4, 48)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("tasks", [[5], [4, 2], [0, 1, 2, 3, 7, 9]])
def test_shards_share_the_episodes_between_them(tasks: list[int], shards: int) -> None:
    each = 60 // shards
    taken = [schedule.next() for n in range(shards) for schedule in [_schedule(tasks, shard=(n, shards))] * each]
    whole = _schedule(tasks)
    assert sorted(taken) == sorted(whole.next() for _ in range(each * shards))


def test_shards_draw_different_states_with_one_seed() -> None:
    first, second = (_schedule([0], init_state_mode="random", seed=3, shard=(n, 2)) for n in range(2))
    assert [first.next() for _ in range(20)] != [second.next() for _ in range(20)]


def test_fixed_and_random() -> None:
    assert [_schedule([1], init_state_mode="fixed", init_state_id=7).next() for _ in range(3)] == [(1, 7)] * 3
    schedule = _schedule([0], init_state_mode="random", seed=3)
    first = [schedule.next() for _ in range(400)]
    assert {task for task, _ in first} == {0} and {state for _, state in first} == set(range(50))
    schedule.set_seed(3)
    assert [schedule.next() for _ in range(400)] == first
    schedule.set_seed(4)
    assert [schedule.next() for _ in range(400)] != first


def test_what_the_caller_chooses_leaves_the_rest_of_the_order_alone() -> None:
    schedule = _schedule([4, 2])
    assert schedule.next(init_state_id=30) == (4, 30)
    assert schedule.next(task_id=4) == (4, 0)
    assert schedule.next(task_id=9, init_state_id=1) == (9, 1)
    assert [schedule.next(), schedule.next()] == [(2, 0), (4, 1)]


@pytest.mark.parametrize(
    ("task_ids", "options", "message"),
    [
        ([], {}, "task_ids is empty"),
        ([1, 2, 1], {}, r"task_ids=\[1, 2, 1\] names a task twice"),
        ([0, 10], {}, r"task_id=10 is not a task of libero_spatial: it must be in 0\.\.9"),
        ([3], {"init_state_id": 50}, r"init_state_id=50 is not an initial state of task 3.*0\.\.49"),
        ([3], {"init_state_id": -1}, r"init_state_id=-1"),
        ([3], {"shard": (2, 2)}, r"shard must be \(number, of how many\), numbered from 0, got \(2, 2\)"),
        ([3], {"init_state_mode": "shuffle"}, "must be one of cycle, random, fixed, got 'shuffle'"),
    ],
)
def test_bad_arguments(task_ids: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _schedule(task_ids, **options)


def test_bad_requests() -> None:
    schedule = _schedule([0])
    with pytest.raises(ValueError, match="task_id=11"):
        schedule.next(task_id=11)
    with pytest.raises(ValueError, match="init_state_id=50"):
        schedule.next(init_state_id=50)
