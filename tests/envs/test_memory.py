"""What estimates of memory grow with, what is refused, and models that make room for others."""

from __future__ import annotations

import re

import numpy as np
import pytest

from torchrl_vla.envs.memory import available_memory, check_memory, count_models, memory_needed, models_that_fit
from torchrl_vla.envs.simulation.simulator import LiberoSimulator


def test_estimates_grow_with_environments_workers_and_models() -> None:
    for small, large in (
        ((64, 16, 1), (65, 16, 1)),
        ((64, 1, 1), (64, 2, 1)),
        ((64, 15, 1), (64, 16, 1)),
        ((8, 2, 3), (8, 2, 4)),
        # The fuller process of two runs three environments.
        ((5, 2, 2), (5, 2, 3)),
    ):
        assert memory_needed(*small) < memory_needed(*large), (small, large)


def test_a_process_holds_no_more_models_than_it_runs_environments() -> None:
    assert memory_needed(8, 2, models=4) == memory_needed(8, 2, models=10)
    assert memory_needed(5, 2, models=3) == memory_needed(5, 2, models=10)


def test_environments_of_a_model_that_is_there_cost_little() -> None:
    """At most 30 MB each; a model with its renderer takes hundreds, and a process as much besides."""
    environment = memory_needed(64, 1, 1) - memory_needed(63, 1, 1)
    model = memory_needed(64, 1, 2) - memory_needed(64, 1, 1)
    process = memory_needed(64, 3, 1) - memory_needed(64, 2, 1) - model
    assert environment < 30e6 and min(model, process) > 300e6


def test_tasks_share_a_model_where_suites_do() -> None:
    assert count_models("libero_spatial", 10) == count_models("libero_goal", 3) == 1
    assert count_models("libero_object", 10) == 10


def test_spare_memory_keeps_models() -> None:
    """Two environments of ten models run in each of two processes, which keep one more where both have room for it."""
    needed = memory_needed(4, 2, models=10)
    both = memory_needed(4, 2, models=2) - memory_needed(4, 2, models=1)
    spare = (-needed / 2, 0, 0.95 * both, 1.05 * both, 2.05 * both, 100 * both)
    assert [models_that_fit(4, 2, 10, needed + some) for some in spare] == [2, 2, 2, 3, 4, 10]


def test_a_refusal_names_the_numbers_and_what_fits() -> None:
    enough = memory_needed(180, 2, 1)
    check_memory(180, 2, 1, enough)
    with pytest.raises(ValueError) as refused:
        check_memory(184, 2, 1, enough)
    for part in ("184 environments in 2 process(es)", f"{enough / 1e9:.1f} GB are available", "set num_envs=180,"):
        assert part in str(refused.value)
    with pytest.raises(ValueError, match="Not even one per process fits"):
        check_memory(8, 2, 1, memory_needed(2, 2, 1) - 1)
    with pytest.raises(ValueError, match=r"use fewer workers \(at most 3, with one each\)"):
        check_memory(16, 16, 1, memory_needed(3, 3, 1))


def test_available_memory_is_less_than_the_machine_has() -> None:
    with open("/proc/meminfo") as file:
        total = float(re.search(r"MemTotal: *(\d+)", file.read()).group(1)) * 1024
    assert 0 < available_memory() < total


@pytest.mark.simulator
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


@pytest.mark.simulator
def test_models_of_running_episodes_stay() -> None:
    simulator = LiberoSimulator("libero_object", num_slots=2, max_models=1, settle_steps=0, fidelity="fast")
    simulator.reset(0, 0, 0)
    simulator.reset(1, 1, 0)
    assert set(simulator._tasks) == {0, 1}
    simulator.step(0, np.zeros((1, 7)))
    simulator.reset(0, 1, 0)
    assert set(simulator._tasks) == {1}
    simulator.close()
