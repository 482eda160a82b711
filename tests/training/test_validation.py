"""Validation: how the policy is asked to act, on which episodes, and what is said about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.envs.utils import ExplorationType, exploration_type

from torchrl_vla.config import OpenVLAActorConfig, PPOConfig, TrainConfig
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.validation import Validation


class Idle:
    """A policy that does nothing, and notes how and where it is asked to act."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.asked: set[tuple[float, ExplorationType | None]] = set()
        self.states: set[int] = set()

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.asked.add((self.temperature, exploration_type()))
        self.states.update(tensordict["init_state_id"].flatten().tolist())
        return tensordict.set("action", torch.zeros(*tensordict.shape, 4, 2))


@pytest.mark.parametrize(
    ("eval_temperature", "greedy_at_0", "asked"),
    [
        (0.5, True, (0.5, ExplorationType.RANDOM)),
        (0.0, True, (1.3, ExplorationType.DETERMINISTIC)),
        (0.0, False, (1.3, ExplorationType.RANDOM)),
    ],
)
def test_a_validation_acts_as_asked_and_gives_the_rollouts_temperature_back(
    eval_temperature: float, greedy_at_0: bool, asked: tuple[float, ExplorationType], tmp_path: Path
):
    ppo = PPOConfig(
        eval_temperature=eval_temperature,
        rollout_temperature=1.3,
        val_episodes=2,
        val_videos=False,
        init_state_ids=[1],
        val_init_state_ids=[7, 8],
        reward_scale=2.0,
    )
    config = TrainConfig(ppo, OpenVLAActorConfig(deterministic_eval=greedy_at_0))
    logger, actor = RunLogger(tmp_path), Idle(temperature=1.3)
    figures = Validation(config, actor, [ToyTrackingEnv(2)], logger)(0)  # type: ignore[arg-type]
    logger.close()
    assert actor.asked == {asked} and actor.states == {7, 8} and actor.temperature == 1.3
    assert figures["val/mean_reward"] == 2 * figures["val/success_rate"] and figures["time/val_seconds"] > 0
    assert figures["val/success_task_0"] == figures["val/success_rate"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(val_episodes=5), "Validations run 4 episodes, not val_episodes=5"),
        (dict(val_episodes=4), None),
        (dict(val_episodes=5, eval_temperature=0.5), None),
        (dict(val_episodes=5, val_interval=0), None),
    ],
)
def test_greedy_validations_run_no_state_twice(
    options: dict[str, float], said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = TrainConfig(PPOConfig(**options, task_ids=[0, 3], val_init_state_ids=[7, 8]))
    logger = RunLogger(tmp_path)
    Validation(config, Idle(temperature=1.0), [], logger)
    logger.close()
    output = capsys.readouterr().out
    assert said in output if said else "Validations" not in output
    assert ("Training starts from the validations' initial states too" in output) is (config.ppo.val_interval > 0)
    kept_apart = replace(config, ppo=replace(config.ppo, init_state_ids=[0, 1]))
    logger = RunLogger(tmp_path / "apart")
    Validation(kept_apart, Idle(temperature=1.0), [], logger)
    logger.close()
    assert "Training starts" not in capsys.readouterr().out
