#!/usr/bin/env python3
"""TorchRL's loss and advantage in the loop of `torchrl_vla/recipes/grpo.py`: ClipPPOLoss, and GAE with a value network.

What differs from `toy_vla.py`: the rollout's policy also writes values, the buffer's transform is GAE, the loss is
TorchRL's, and its critic learns too. Groups of one: GAE compares no episodes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import tyro
from tensordict.nn import TensorDictSequential
from torchrl.data.vla import UniformActionTokenizer
from torchrl.modules import MLP, ValueOperator
from torchrl.modules.vla import TinyVLA
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_vla.collectors import EpisodePlan, GroupCollector
from torchrl_vla.config import PPOConfig
from torchrl_vla.envs.toy import ToyTrackingEnv, greedy_success_rate
from torchrl_vla.objectives import EstimateAdvantage
from torchrl_vla.recipes.grpo import learn, make_buffer
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.optimizer_step import OptimizerStep
from torchrl_vla.training.progress import RunProgress


def main(
    total_timesteps: int = 150_000, success_tol: float = 0.35, episodes: int = 256, seed: int = 0
) -> tuple[float, float, float]:
    """Learn, and return the success rates before and after, and the control's after."""
    torch.manual_seed(seed)
    ppo = PPOConfig(
        total_timesteps=total_timesteps, batch_size=512, traj_split_num=1, traj_mini_batch_size=48,
        n_epochs=2, actor_lr=2e-3, max_grad_norm=1.0, val_interval=0, log_interval=20_000,
    )  # fmt: skip

    # -- policy and environment ------------------------------------------------------------------------------------
    env = ToyTrackingEnv(episodes, success_tol=success_tol, seed=seed)
    policy = TinyVLA(
        action_dim=2, chunk_size=4, action_head="tokens", vocab_size=64, log_probs_mode="token", output_mode="both",
        action_tokenizer=UniformActionTokenizer(64, low=-1.0, high=1.0), return_vla_action_container=False,
    )  # fmt: skip
    policy.set_keys(action_chunk="action")
    policy(env.reset())  # makes the lazy layers
    before = greedy_success_rate(policy, success_tol=success_tol)

    # -- critic, collector, buffer, loss, step ---------------------------------------------------------------------
    critic = ValueOperator(MLP(in_features=4, out_features=1, num_cells=[64, 64]), in_keys=[("observation", "state")])
    plans = EpisodePlan.stream({0: range(100_000)}, groups=episodes, group_size=1, seed=seed)
    collector = GroupCollector(env, TensorDictSequential(policy, critic), plans)
    advantage = EstimateAdvantage(GAE(gamma=0.99, lmbda=0.95, value_network=None, average_gae=True))
    buffer = make_buffer(advantage)
    loss = ClipPPOLoss(policy, critic, clip_epsilon=(0.2, 0.28), entropy_bonus=False)
    loss.set_keys(action=("vla_action", "tokens"), sample_log_prob=("vla_action", "log_probs"))
    parameters = [*policy.parameters(), *critic.parameters()]
    step = OptimizerStep(loss, torch.optim.Adam(parameters, ppo.actor_lr), ppo)

    # -- the loop --------------------------------------------------------------------------------------------------
    with tempfile.TemporaryDirectory() as folder:
        logger = RunLogger(Path(folder))
        learn(ppo, collector, buffer, step, RunProgress(), logger, advantage=advantage)
        logger.close()
    after = greedy_success_rate(policy, success_tol=success_tol)
    control = greedy_success_rate(policy, success_tol=success_tol, shuffled=True)
    print(f"greedy success {before:.3f} before, {after:.3f} after; with another episode's target {control:.3f}")
    return before, after, control


if __name__ == "__main__":
    tyro.cli(main)
