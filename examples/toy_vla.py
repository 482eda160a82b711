#!/usr/bin/env python3
"""Another environment in the loop of `torchrl_vla/recipes/grpo.py`: TorchRL's ToyVLAEnv, learned by its TinyVLA.

Success is greedy, on targets never trained on. The control shows each episode another one's
target: a policy that did not read its target would do as well. `--help` lists the options.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import tyro
from torchrl.data.vla import UniformActionTokenizer
from torchrl.modules.vla import TinyVLA

from torchrl_vla.collectors import EpisodePlan, GroupCollector
from torchrl_vla.config import PPOConfig
from torchrl_vla.envs.toy import ToyTrackingEnv, greedy_success_rate
from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage
from torchrl_vla.recipes.grpo import learn, make_buffer
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.optimizer_step import OptimizerStep
from torchrl_vla.training.progress import RunProgress


def main(
    total_timesteps: int = 150_000, success_tol: float = 0.35, groups: int = 64, group_size: int = 4, seed: int = 0
) -> tuple[float, float, float]:
    """Learn, and return the success rates before and after, and the control's after."""
    torch.manual_seed(seed)
    ppo = PPOConfig(
        total_timesteps=total_timesteps, batch_size=512, traj_split_num=1, traj_mini_batch_size=6 * group_size,
        n_epochs=2, actor_lr=4e-3, max_grad_norm=1.0, val_interval=0, log_interval=20_000,
    )  # fmt: skip

    # -- policy and environment ------------------------------------------------------------------------------------
    env = ToyTrackingEnv(groups * group_size, success_tol=success_tol, seed=seed)
    policy = TinyVLA(
        action_dim=2, chunk_size=4, action_head="tokens", vocab_size=64, log_probs_mode="token", output_mode="both",
        action_tokenizer=UniformActionTokenizer(64, low=-1.0, high=1.0), return_vla_action_container=False,
    )  # fmt: skip
    policy.set_keys(action_chunk="action")
    policy(env.reset())  # makes the lazy layers
    before = greedy_success_rate(policy, success_tol=success_tol)

    # -- collector, buffer, loss, step -----------------------------------------------------------------------------
    plans = EpisodePlan.stream({0: range(100_000)}, groups=groups, group_size=group_size, seed=seed)
    collector = GroupCollector(env, policy, plans)
    advantage = GRPOAdvantage(keep_low=0.0, keep_high=1.0)
    buffer = make_buffer(advantage)
    loss = AsymmetricClipPPOLoss(policy)
    step = OptimizerStep(loss, torch.optim.Adam(policy.parameters(), ppo.actor_lr), ppo)

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
