"""The simulator's own behaviour: episodes restored, bad input refused, what is shared."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import CAMERAS, random_actions

from torchrl_vla.envs.simulation import settled_states
from torchrl_vla.envs.simulation import simulator as simulator_module
from torchrl_vla.envs.simulation.simulator import LiberoSimulator

pytestmark = pytest.mark.simulator

STEP = np.zeros((1, 7))


@pytest.fixture(scope="module")
def simulator() -> Iterator[LiberoSimulator]:
    simulator = LiberoSimulator("libero_spatial", num_slots=2, image_size=64, cameras=CAMERAS)
    yield simulator
    simulator.close()


def test_a_restored_episode_equals_the_simulated_one(
    simulator: LiberoSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reset restores what the first one settled; one without a memory of it settles again."""
    actions = random_actions(6, 0)
    ends = []
    fresh = LiberoSimulator("libero_spatial", image_size=64)
    for one in (simulator, simulator, fresh):
        if one is fresh:
            monkeypatch.setattr(settled_states, "cache_folder", lambda: tmp_path)
        one.reset(0, 2, 1)
        start = one.low_dim(0)
        one.step(0, actions)
        ends.append([*start.values(), *one.low_dim(0).values(), one.data(0).qpos.copy()])
    fresh.close()
    for end in ends[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(ends[0], end, strict=True))


def test_a_later_reset_of_any_slot_neither_simulates_nor_loads(
    simulator: LiberoSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settled_states, "cache_folder", lambda: tmp_path)
    calls = Counter[str]()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*given: Any) -> Any:
            calls[name] += 1
            return original(*given)

        monkeypatch.setattr(owner, name, counted)

    count(LiberoSimulator, "step")
    count(simulator_module, "read_start")
    count(simulator_module, "load_scene")
    simulator.reset(0, 3, 4)
    assert calls == {"step": 10, "read_start": 1, "load_scene": 1}
    for slot in (0, 1, 0):
        simulator.reset(slot, 3, 4)
    assert calls == {"step": 10, "read_start": 1, "load_scene": 1}


def test_a_chunk_equals_its_actions_one_by_one(simulator: LiberoSimulator) -> None:
    actions = random_actions(5, 1)
    simulator.reset(0, 0, 0)
    assert simulator.step(0, actions) == (5, False)
    simulator.reset(1, 0, 0)
    for action in actions:
        assert simulator.step(1, action[None]) == (1, False)
    assert np.array_equal(simulator.data(0).qpos, simulator.data(1).qpos)
    assert np.array_equal(simulator.render(0, "agentview"), simulator.render(1, "agentview"))


def test_observations_are_stocks_and_one_substep_old(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 0, 0)
    simulator.step(0, np.array([[1.0, 0, 0, 0, 0, 0, -1]] * 4))
    observed, data = simulator.low_dim(0), simulator.data(0)
    now = data.site_xpos[simulator.model(0).site("gripper0_grip_site").id]
    gap = now[0] - observed["robot0_eef_pos"][0]
    # 2 ms at the speed of a steady forward motion, some 0.2 m/s.
    assert 1e-4 < gap < 1e-3
    assert {name: value.shape for name, value in observed.items()} == {
        "robot0_eef_pos": (3,),
        "robot0_eef_quat": (4,),
        "robot0_gripper_qpos": (2,),
    }


def test_pictures_differ_between_cameras_and_are_upside_down(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 0, 0)
    front, wrist = (simulator.render(0, camera) for camera in CAMERAS)
    assert front.shape == wrist.shape == (64, 64, 3) and front.dtype == np.uint8
    assert (front != wrist).any()
    # The light table fills the bottom of the upright picture, which comes first, and the grey floor its top.
    assert front[:8].mean() > front[-8:].mean() + 30


def test_fixtures_move_with_the_seed_and_slots_of_other_tasks_do_not_see_it() -> None:
    poses = []
    for seed in (0, 1):
        simulator = LiberoSimulator("libero_spatial", seed=seed)
        simulator.reset(0, 0, 0)
        poses.append(simulator.model(0).body("wooden_cabinet_1_main").pos.copy())
    assert 1e-4 < np.abs(poses[0] - poses[1]).max() < 0.03


def test_fast_stays_close_to_exact(simulator: LiberoSimulator) -> None:
    fast = LiberoSimulator("libero_spatial", image_size=64, fidelity="fast")
    actions = random_actions(24, 2)
    simulator.reset(0, 0, 0)
    fast.reset(0, 0, 0)
    exact_picture, fast_picture = simulator.render(0, "agentview"), fast.render(0, "agentview")
    assert 0 < np.abs(exact_picture.astype(int) - fast_picture).mean() < 6
    simulator.step(0, actions)
    fast.step(0, actions)
    deviation = np.abs(simulator.data(0).qpos - fast.data(0).qpos).max()
    assert 0 < deviation < 1e-5
    fast.close()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.full((2, 7), np.nan), "slot 0 must be finite"),
        (np.zeros(7), r"shape \[n, 7\], got \[7\]"),
        (np.zeros((3, 6)), r"got \[3, 6\]"),
    ],
)
def test_bad_actions_are_refused(simulator: LiberoSimulator, actions: np.ndarray, message: str) -> None:
    simulator.reset(0, 0, 0)
    before = simulator.data(0).qpos.copy()
    with pytest.raises(ValueError, match=message):
        simulator.step(0, actions)
    assert np.array_equal(simulator.data(0).qpos, before)


def test_bad_places_are_refused(simulator: LiberoSimulator) -> None:
    with pytest.raises(ValueError, match=r"init_state_id=50 .* 0\.\.49"):
        simulator.reset(0, 0, 50)
    with pytest.raises(ValueError, match="task_id=10"):
        simulator.reset(0, 10, 0)
    with pytest.raises(ValueError, match=r"slot=2 does not exist: it must be in 0\.\.1"):
        simulator.reset(2, 0, 0)
    with pytest.raises(ValueError, match="no camera 'top' in this scene. Its cameras are: .*agentview"):
        simulator.reset(0, 0, 0)
        simulator.render(0, "top")
    with pytest.raises(ValueError, match="Slot 1 runs no episode yet"):
        LiberoSimulator("libero_spatial", num_slots=2).step(1, STEP)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'exact' or 'fast', got 'best'"):
        LiberoSimulator("libero_spatial", fidelity="best")
    with pytest.raises(ValueError, match="num_slots=0"):
        LiberoSimulator("libero_spatial", num_slots=0)
    with pytest.raises(ValueError, match="no camera 'top'"):
        LiberoSimulator("libero_spatial", cameras=("top",)).reset(0, 0, 0)


def test_a_second_process_needs_neither_robosuite_nor_a_compiler(simulator: LiberoSimulator) -> None:
    """With warm caches it only loads; nothing is printed when it ends."""
    simulator.reset(0, 0, 0)
    simulator.step(0, STEP)
    program = (
        "import sys, numpy as np\n"
        "from torchrl_vla.envs.simulation.simulator import LiberoSimulator\n"
        "from torchrl_vla.envs.simulation.control import control_step\n"
        "simulator = LiberoSimulator('libero_spatial', image_size=32)\n"
        "simulator.reset(0, 0, 0)\n"
        "simulator.step(0, np.zeros((1, 7)))\n"
        "simulator.render(0, 'agentview')\n"
        "assert 'robosuite' not in sys.modules and 'torch' not in sys.modules\n"
        "assert control_step.stats.cache_hits and not control_step.stats.cache_misses\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
