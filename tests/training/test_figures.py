"""The figures of a run have the names that the guide lists."""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from token_policy import make_actor, make_batch
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives.value import GAE

from torchrl_vla.config import OpenVLAActorConfig, PPOConfig, TrainConfig
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.objectives import AsymmetricClipPPOLoss, EstimateAdvantage
from torchrl_vla.recipes.grpo import learn, make_buffer
from torchrl_vla.training.figures import nothing_to_learn, rollout_figures
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.optimizer_step import OptimizerStep
from torchrl_vla.training.progress import RunProgress
from torchrl_vla.training.validation import Validation

#: "Expected Metrics" of the guide that the options are from.
GUIDE = {
    "rollout/success_rate", "rollout/mean_length", "rollout/num_trajectories", "rollout/collection_time",
    "train/policy_loss", "train/value_loss", "train/clipfrac", "train/approx_kl",
    "val/success_rate", "val/mean_reward",
}  # fmt: skip


class Still(nn.Module):
    """Does nothing, in validations."""

    temperature = 1.0

    def forward(self, data: TensorDict) -> TensorDict:
        return data.set("action", torch.zeros(*data.shape, 4, 2))


def test_the_guides_ten_figures_are_in_metrics_csv(tmp_path: Path):
    """With a value head, as the value loss needs one; from a whole loop, its validation included."""
    ppo = PPOConfig(
        total_timesteps=24,
        val_interval=24,
        val_episodes=2,
        val_videos=False,
        init_state_ids=[1],
        val_init_state_ids=[7],
    )
    config = TrainConfig(ppo, OpenVLAActorConfig())
    actor, logger = make_actor(), RunLogger(tmp_path)
    critic = ValueOperator(nn.Linear(4, 1), in_keys=[("observation", "state")])
    batch = TensorDictSequential(critic)(make_batch(actor)).detach()
    batch["next"].update({"state_value": torch.zeros(12, 1), "terminated": batch["next", "done"].clone()})
    advantage = EstimateAdvantage(GAE(gamma=0.9, lmbda=0.9, value_network=None))
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters()], lr=1e-2)
    step = OptimizerStep(AsymmetricClipPPOLoss(actor, critic), optimizer, ppo)
    validation = Validation(config, Still(), [ToyTrackingEnv(2)], logger)  # type: ignore[arg-type]
    learn(ppo, [batch], make_buffer(advantage), step, RunProgress(), logger, advantage=advantage, validate=validation)
    logger.close()
    last = logger.rows[-1]
    assert set(last) >= GUIDE and set(logger.csv_path.read_text().splitlines()[0].split(",")) >= GUIDE
    assert last["rollout/mean_length"] == 24 / 6 and last["rollout/num_trajectories"] == 6
    assert last["rollout/success_rate"] == 0.5 and last["rollout/collection_time"] == last["time/rollout_seconds"]


def test_figures_of_rows_and_of_what_has_no_success():
    done = torch.tensor([[[False], [True]], [[False], [False]]])
    batch = TensorDict({"next": {"done": done, "reward": torch.ones(2, 2, 1)}}, [2, 2])
    figures = rollout_figures(batch, 2.0)
    assert (figures["rollout/env_steps"], figures["rollout/num_trajectories"], figures["rollout/mean_return"]) == (
        4, 1, 4.0,
    )  # fmt: skip
    assert figures["time/rollout_decisions_per_second"] == 2.0 and "rollout/success_rate" not in figures
    none_ended = rollout_figures(batch[1:], 2.0)
    assert (none_ended["rollout/num_trajectories"], none_ended["rollout/mean_length"]) == (0, 2.0)


def test_why_there_is_nothing_to_learn():
    stats = {"all_failed": 3, "all_succeeded": 2, "out_of_bounds": 1, "incomplete": 4}
    said = nothing_to_learn({f"dropped_{reason}": count for reason, count in stats.items()})
    assert "3 failed throughout, 2 succeeded throughout, 1 outside the bounds, 4 with too few" in said
    assert nothing_to_learn({"completed_groups": 3}).startswith("The buffer's transforms dropped every decision")
