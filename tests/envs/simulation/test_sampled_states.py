"""Initial states drawn from the tasks' regions: where official ones lie, and yet none of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from torchrl_vla.envs import LiberoEnv, get_suite
from torchrl_vla.envs.simulation import sampled_states
from torchrl_vla.envs.simulation.sampled_states import sampled_init_states
from torchrl_vla.envs.simulation.simulator import LiberoSimulator

pytestmark = pytest.mark.simulator

# A bowl in a drawer that stands open, one on a cabinet, and objects on the table.
TASK = get_suite("libero_spatial").task(4)
ARM = slice(1, 8)


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    return sampled_init_states(TASK.bddl_file, 50, seed=1)


def test_states_lie_where_official_ones_do(states: np.ndarray):
    official = TASK.init_states
    assert states.shape == official.shape and states.dtype == np.float64
    margin = 0.01  # metres and radians; regions are some 3 cm wide
    low, high = official.min(0) - margin, official.max(0) + margin
    low[ARM] -= 0.03
    high[ARM] += 0.03
    assert (states >= low).all() and (states <= high).all()
    # What never varies (height, gripper, velocity, doors that stay shut) is the same, what varies does so here too.
    still = official.std(0) < 1e-6
    np.testing.assert_allclose(states[:, still], np.broadcast_to(official[0, still], states[:, still].shape), atol=1e-6)
    assert (states.std(0)[~still] > 0.2 * official.std(0)[~still]).all()
    assert states[:, ARM].std(0) == pytest.approx(0.02, abs=0.006)


def test_no_state_is_an_official_one_or_twice_there(states: np.ndarray):
    def nearest(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.abs(ones[:, None] - others[None]).max(-1)

    assert nearest(states, TASK.init_states).min() > 1e-3
    distances = nearest(states, states)
    assert distances[~np.eye(len(states), dtype=bool)].min() > 1e-3


def test_a_state_depends_on_seed_and_number_alone(states: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampled_states, "cache_folder", lambda: tmp_path)
    before = np.random.get_state()[1]
    again = sampled_init_states(TASK.bddl_file, 3, seed=1)
    assert np.array_equal(np.random.get_state()[1], before)
    np.testing.assert_array_equal(again, states[:3])
    assert np.abs(sampled_init_states(TASK.bddl_file, 3, seed=2) - again).max(-1).min() > 1e-3
    assert len(list(tmp_path.glob("init_states/*.npz"))) == 2


def test_what_was_drawn_is_kept_and_drawn_again_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draws: list[int] = []

    def draw(_: Path, count: int, seed: int, fixture_seed: int) -> np.ndarray:
        draws.append(seed)
        return np.full((count, 4), 10.0 * seed + fixture_seed)

    monkeypatch.setattr(sampled_states, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(sampled_states, "_draw", draw)
    for fixture_seed in (0, 0, 3):
        states = sampled_init_states(TASK.bddl_file, 2, seed=5, fixture_seed=fixture_seed)
        assert states.tolist() == [[50.0 + fixture_seed] * 4] * 2
    assert draws == [5, 5]
    next(tmp_path.glob("init_states/*.npz")).write_bytes(b"PK")
    with pytest.warns(UserWarning, match="is damaged and will be built again"):
        for fixture_seed in (0, 3):
            sampled_init_states(TASK.bddl_file, 2, seed=5, fixture_seed=fixture_seed)
    assert draws == [5, 5, 5]
    with pytest.raises(ValueError, match="seed not negative, got count=50 and seed=-1"):
        sampled_init_states(TASK.bddl_file, 50, seed=-1)


def test_simulator_and_environment_start_from_them(states: np.ndarray):
    simulator = LiberoSimulator("libero_spatial", image_size=16, settle_steps=0, fidelity="fast", sampled_init_states=1)
    simulator.reset(0, 4, 7)
    data = simulator.data(0)
    np.testing.assert_array_equal(data.qpos, states[7, 1 : 1 + len(data.qpos)])
    state = simulator.low_dim(0)["robot0_eef_pos"]
    simulator.close()
    env = LiberoEnv(
        "libero_spatial", 4, image_size=16, settle_steps=0, fidelity="fast", init_state_id=7, sampled_init_states=1
    )
    np.testing.assert_allclose(env.reset()["observation", "state"][:3], state, atol=1e-6)
    env.close()
    with pytest.raises(ValueError, match="sampled_init_states must be a seed, 0 or more, got -1"):
        LiberoEnv("libero_spatial", sampled_init_states=-1)
