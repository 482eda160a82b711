"""The goal check agrees with LIBERO's predicates, on states where a goal holds and where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np
import pytest

from torchrl_vla.envs.simulation.model_cache import compile_model, load_scene
from torchrl_vla.envs.simulation.scene import Predicate, Scene
from torchrl_vla.envs.simulation.scene_builder import built_environment
from torchrl_vla.envs.simulation.success import GoalChecker
from torchrl_vla.envs.tasks import SUITES, get_suite

pytestmark = pytest.mark.simulator

# Among them: on an object, on and in a site, two conditions, a drawer, a microwave, a stove.
SLIM = [("libero_goal", task) for task in range(10)] + [("libero_10", task) for task in (2, 3, 9)]
ALL = [(suite, task) for suite in SUITES for task in range(90 if suite == "libero_90" else 10)]


def check(suite: str, task_id: int, states: int) -> None:
    task = get_suite(suite).task(task_id)
    scene, compiled = load_scene(task.bddl_file, 0)
    checker = GoalChecker(scene, compiled.model.ngeom)
    with built_environment(task.bddl_file, 0, compile_model) as domain:
        answers = []
        for _ in stirred(domain, scene, task.init_states, states):
            expected = bool(domain._check_success())
            assert checker(domain.sim.data._data) == expected
            answers.append(expected)
    assert 0 < sum(answers) < states, f"only {sum(answers)} of {states} states reach the goal"


def stirred(domain: Any, scene: Scene, init_states: np.ndarray, count: int) -> Iterator[None]:
    """Sets initial states, then moves what the goal speaks of to places where it holds, nearly holds or does not."""
    model, data = domain.sim.model._model, domain.sim.data._data
    generator = np.random.default_rng(0)
    for index in range(count):
        state = init_states[index % len(init_states)]
        data.qpos[:] = state[1 : 1 + model.nq]
        data.qvel[:] = 0
        mujoco.mj_forward(model, data)
        if index % 8:
            # Last first: what others are put on or in is named there.
            for predicate in reversed(scene.goal):
                nudge(model, data, predicate, generator)
                mujoco.mj_forward(model, data)
        yield


def nudge(model: mujoco.MjModel, data: mujoco.MjData, predicate: Predicate, generator: np.random.Generator) -> None:
    if predicate.kind == "joints":
        for address in predicate.qpos:
            data.qpos[address] = predicate.threshold + generator.choice([-0.1, -1e-9, 0.0, 1e-9, 0.1])
        return
    if predicate.kind == "on_object":
        place = data.xpos[predicate.target_body] + generator.uniform([-0.025, -0.025, -0.01], [0.025, 0.025, 0.08])
    else:
        size = np.array(predicate.size)
        high = size + [0.0, 0.0, 0.11 if predicate.kind == "on_site" else 0.02]
        offset = generator.uniform(-1.1 * size - [0, 0, 0.02], 1.1 * high)
        place = data.site_xpos[predicate.site] + data.site_xmat[predicate.site].reshape(3, 3).T @ offset
    address = model.jnt_qposadr[model.body_jntadr[predicate.body]]
    data.qpos[address : address + 3] = place


@pytest.mark.parametrize(("suite", "task_id"), SLIM)
def test_agrees_with_the_original_predicates(suite: str, task_id: int) -> None:
    check(suite, task_id, states=200)


@pytest.mark.full
@pytest.mark.parametrize(("suite", "task_id"), ALL)
def test_agrees_with_the_original_predicates_on_every_task(suite: str, task_id: int) -> None:
    check(suite, task_id, states=400)
