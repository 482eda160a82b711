"""The expert's skills: chosen from the goals of all of LIBERO's tasks, and each at work in the real simulator."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from torchrl_vla.demonstrations.expert.articulation import find_articulation
from torchrl_vla.demonstrations.expert.expert import ScriptedExpert
from torchrl_vla.demonstrations.expert.skills import order_goals
from torchrl_vla.demonstrations.expert.task_goals import Goal, UnreachableGoalError, can_reach, read_goals
from torchrl_vla.demonstrations.expert.trials import evaluate_expert
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.envs.tasks import SUITES, get_suite


def test_every_task_of_libero_asks_for_what_there_is_a_skill_for() -> None:
    """All 130 tasks; how many conditions of each kind they have, counted by hand from the definitions' text."""
    goals = {suite: [read_goals(task.bddl_file) for task in get_suite(suite).tasks] for suite in SUITES}
    assert {suite: sum(map(can_reach, tasks)) for suite, tasks in goals.items()} == {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 10,
        "libero_10": 10,
        "libero_90": 90,
    }
    text = "".join(
        task.bddl_file.read_text().lower().partition("(:goal")[2] for suite in SUITES for task in get_suite(suite).tasks
    )
    kinds = Counter(goal.predicate for tasks in goals.values() for task in tasks for goal in task)
    assert kinds == {kind: text.count(f"({kind} ") for kind in ("on", "in", "open", "close", "turnon", "turnoff")}
    assert not can_reach([Goal("up", "bowl_1")])


def test_the_order_of_skills() -> None:
    put, shut = Goal("in", "bowl_1", "cabinet_1_bottom_region"), Goal("close", "cabinet_1_bottom_region")
    stand, on = Goal("on", "pot_1", "stove_1_cook_region"), Goal("turnon", "stove_1")
    # Closed around what was put inside; else first, and what is opened or switched before what is moved.
    assert order_goals([shut, put], inside=[put]) == [put, shut]
    assert order_goals([Goal("open", "cabinet_1_top_region"), shut])[0] == shut
    assert order_goals([stand, on]) == [on, stand]
    # A door is named by its object, the region behind it by a longer name.
    microwave = [Goal("close", "microwave_1"), Goal("in", "mug_1", "microwave_1_heating_region")]
    assert order_goals(microwave, inside=microwave[1:]) == microwave[::-1]
    # What carries another object is in its place first.
    stacked = [Goal("on", "bowl_1", "bowl_2"), Goal("in", "bowl_2", "tray_1_contain_region")]
    assert order_goals(stacked) == stacked[::-1]


@pytest.mark.simulator
def test_joints_are_found_by_regions_and_objects() -> None:
    simulator = LiberoSimulator("libero_goal", fidelity="fast")
    simulator.reset(0, 0, 0)
    model, data = simulator.model(0), simulator.data(0)
    drawer = find_articulation(model, "wooden_cabinet_1_middle_region")
    knob = find_articulation(model, "flat_stove_1")
    assert drawer is not None and model.joint(drawer.joint).name == "wooden_cabinet_1_middle_level" and drawer.slides
    assert knob is not None and model.joint(knob.joint).name == "flat_stove_1_button" and not knob.slides
    assert (drawer.opened, drawer.closed) == (-0.16, 0.01) and knob.opened == 2.1
    assert find_articulation(model, "plate_1") is None and find_articulation(model, "no_such_thing") is None
    # Opened by 10 cm, the drawer, whose cabinet faces the table's middle, takes a held pose 10 cm along.
    position, rotation = drawer.carried(data, np.zeros(3), np.eye(3), -0.1)
    np.testing.assert_allclose(position, [0.0, 0.1, 0.0], atol=1e-3)
    np.testing.assert_array_equal(rotation, np.eye(3))
    # A quarter turn about the knob's upright axis.
    anchor = data.xanchor[knob.joint]
    position, rotation = knob.carried(data, anchor + [0.02, 0.0, 0.0], np.eye(3), np.pi / 2)
    np.testing.assert_allclose(position, anchor + [0.0, 0.02, 0.0], atol=1e-6)
    np.testing.assert_allclose(rotation[:, 0], [0.0, 1.0, 0.0], atol=1e-6)
    simulator.close()


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("suite", "task_id", "most_steps"),
    [
        pytest.param("libero_goal", 0, 110, id="open the middle drawer"),
        pytest.param("libero_goal", 3, 250, id="open the top drawer and put the bowl inside"),
        pytest.param("libero_goal", 7, 90, id="turn on the stove"),
        pytest.param("libero_10", 3, 220, id="put the bowl in the bottom drawer and close it"),
        pytest.param("libero_10", 8, 290, id="two moka pots side by side on the stove"),
        pytest.param("libero_10", 9, 330, id="put the mug in the microwave and close its door"),
    ],
)
def test_it_solves_tasks_of_each_skill(suite: str, task_id: int, most_steps: int) -> None:
    (episode,) = evaluate_expert(suite, [task_id], [0], fidelity="fast")
    assert episode.success and episode.num_steps < most_steps


@pytest.mark.simulator
def test_a_drawer_just_above_the_table_is_refused() -> None:
    """Before anything moves: the hand would be in the table where it holds the bottom drawer's handle."""
    simulator = LiberoSimulator("libero_goal", fidelity="fast")
    simulator.reset(0, 0, 0)
    expert = ScriptedExpert(simulator.model(0), [Goal("open", "wooden_cabinet_1_bottom_region")])
    with pytest.raises(UnreachableGoalError, match="handle is so near to the table"):
        expert.reset(simulator.data(0))
    simulator.close()
