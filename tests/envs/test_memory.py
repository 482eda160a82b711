"""Estimates of memory by hand, what is refused, and models that make room for others."""

from __future__ import annotations

import re

import numpy as np
import pytest

from torchrl_vla.envs.memory import available_memory, check_memory, count_models, memory_needed, models_that_fit
from torchrl_vla.envs.simulator import LiberoSimulator


@pytest.mark.parametrize(
    ("num_envs", "workers", "models", "gigabytes"),
    [
        (1, 1, 1, 1.1 + 0.005),
        (64, 16, 1, 16 * (0.45 + 1.1) + 0.32),
        (8, 2, 10, 2 * (0.45 + 4 * 1.1) + 0.04),
        (8, 1, 3, 3 * 1.1 + 0.04),
    ],
)
def test_estimates(num_envs: int, workers: int, models: int, gigabytes: float) -> None:
    assert memory_needed(num_envs, workers, models) == pytest.approx(gigabytes * 1e9)


def test_tasks_share_a_model_where_suites_do() -> None:
    assert count_models("libero_spatial", 10) == count_models("libero_goal", 3) == 1
    assert count_models("libero_object", 10) == 10


def test_spare_memory_keeps_models() -> None:
    """Two environments of ten models in each of two processes need 5.3 GB; every further 2.2 GB keep one more."""
    needed = memory_needed(4, 2, models=10)
    assert [models_that_fit(4, 2, 10, needed + spare) for spare in (-1e9, 0, 2.1e9, 2.3e9, 1e12)] == [2, 2, 2, 3, 10]


def test_a_refusal_names_the_numbers_and_what_fits() -> None:
    # 2 x (0.45 + 1.1) GB and 5 MB each.
    check_memory(180, 2, 1, 4e9)
    with pytest.raises(ValueError) as refused:
        check_memory(182, 2, 1, 4e9)
    for part in ("182 environments in 2 process(es)", "4.0 GB are available", "set num_envs=180,"):
        assert part in str(refused.value)
    with pytest.raises(ValueError, match="Not even one per process fits"):
        check_memory(8, 2, 1, 3e9)


def test_available_memory_is_less_than_the_machine_has() -> None:
    with open("/proc/meminfo") as file:
        total = float(re.search(r"MemTotal: *(\d+)", file.read()).group(1)) * 1024
    assert 0 < available_memory() < total


def test_models_make_room_and_come_back() -> None:
    """One slot goes from task to task of a suite that has a model per task, and back."""
    options = {"image_size": 32, "settle_steps": 1, "fidelity": "fast"}
    narrow, wide = (LiberoSimulator("libero_object", max_models=most, **options) for most in (1, None))
    action = np.full((1, 7), 0.3)
    for task_id in (0, 1, 0):
        seen = []
        for simulator in (narrow, wide):
            simulator.reset(0, task_id, 2)
            simulator.step(0, action)
            seen.append((simulator.render(0, "agentview"), simulator.low_dim(0)["robot0_eef_pos"]))
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*seen, strict=True))
    assert (len(narrow._renderers), len(narrow._tasks), len(wide._renderers)) == (1, 1, 2)
    narrow.close()
    wide.close()


def test_models_of_running_episodes_stay() -> None:
    simulator = LiberoSimulator("libero_object", num_slots=2, max_models=1, settle_steps=0, fidelity="fast")
    simulator.reset(0, 0, 0)
    simulator.reset(1, 1, 0)
    assert set(simulator._tasks) == {0, 1}
    simulator.step(0, np.zeros((1, 7)))
    simulator.reset(0, 1, 0)
    assert set(simulator._tasks) == {1}
    simulator.close()
