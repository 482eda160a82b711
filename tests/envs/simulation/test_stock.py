"""The stock simulator behind our interface is stock: what the identity of the faster one is measured against."""

import numpy as np
import pytest

from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.envs.simulation.stock import StockSimulator

pytestmark = pytest.mark.simulator


def test_two_slots_step_like_the_fast_simulator_and_leave_numpys_generator_alone() -> None:
    options = {"num_slots": 2, "image_size": 16, "settle_steps": 1}
    stock, ours = StockSimulator("libero_goal", **options), LiberoSimulator("libero_goal", **options)
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 3, 7))
    state = np.random.get_state()[1].copy()
    for simulator in (stock, ours):
        # The second reset of a slot must equal the first of another.
        simulator.reset(0, task_id=5, init_state_id=3)
        simulator.reset(0, task_id=5, init_state_id=1)
        simulator.reset(1, task_id=2, init_state_id=4)
    for half in (slice(0, 1), slice(1, 3)):
        for slot in (0, 1):
            assert stock.step(slot, actions[slot, half]) == ours.step(slot, actions[slot, half])
    for slot in (0, 1):
        assert np.array_equal(stock.render(slot, "agentview"), ours.render(slot, "agentview"))
        expected = ours.low_dim(slot)
        assert set(stock.low_dim(slot)) == set(expected)
        for name, value in stock.low_dim(slot).items():
            assert np.array_equal(value, expected[name]), name
    assert np.array_equal(np.random.get_state()[1], state)
    ours.close()
    stock.close()
    stock.close()


def test_there_is_one_fidelity() -> None:
    with pytest.raises(ValueError, match="fidelity='exact' only, got 'fast'"):
        StockSimulator("libero_goal", fidelity="fast")
