#!/usr/bin/env python3
"""Learn TorchRL's ToyVLAEnv on one CPU core: `python scripts/toy_vla.py`. Checks loss, advantage, collector and loop.

The setting is that of TorchRL's `vla_grpo` recipe: its TinyVLA, 64 tokens per dimension, chunks of 4 actions, 6
decisions. Success is judged greedily in the stock environment, on targets never trained on. The control shuffles the
targets between the rows of a batch: a policy that ignored its target would score the same in both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torchrl.data.vla import UniformActionTokenizer
from torchrl.envs import Compose, StepCounter, ToyVLAEnv, TransformedEnv
from torchrl.envs.transforms import ActionTokenizerTransform, MultiAction, SuccessReward
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules.vla import TinyVLA

from torchrl_vla.collectors import EpisodePlan, GroupCollector
from torchrl_vla.config import PPOConfig
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.optimizer_step import PPOTrainer

VOCABULARY, CHUNK_SIZE, ACTION_DIM, SUCCESS_STEPS, MAX_DECISIONS = 64, 4, 2, 2, 6
STATE = ("observation", "state")


class Setting(NamedTuple):
    """How much to train at a tolerance, and what to reach."""

    total_timesteps: int
    groups: int
    group_size: int
    success: float
    seconds: float
    control: float | None


SETTINGS = {
    0.35: Setting(150_000, groups=32, group_size=8, success=0.95, seconds=60, control=0.70),
    0.25: Setting(350_000, groups=32, group_size=8, success=0.95, seconds=60, control=0.45),
    # A random policy succeeds in 1 of 100 episodes here: larger groups, or almost none has a success.
    0.15: Setting(1_800_000, groups=64, group_size=16, success=0.80, seconds=600, control=None),
}


class Result(NamedTuple):
    """What one run came to."""

    success: float
    control: float
    seconds: float
    decisions_per_second: float
    curve: list[tuple[int, float]]

    def meets(self, setting: Setting) -> bool:
        """Whether success, time and control are what the setting asks for."""
        in_time = self.success >= setting.success and self.seconds <= setting.seconds
        return in_time and (setting.control is None or self.control <= setting.control)


def make_tokenizer() -> UniformActionTokenizer:
    """64 equal bins per dimension."""
    return UniformActionTokenizer(VOCABULARY, low=-1.0, high=1.0)


def make_policy() -> TinyVLA:
    """TorchRL's TinyVLA with a token head, one log-probability per token, the decoded chunk written to `action`."""
    policy = TinyVLA(
        action_dim=ACTION_DIM,
        chunk_size=CHUNK_SIZE,
        action_head="tokens",
        vocab_size=VOCABULARY,
        log_probs_mode="token",
        output_mode="both",
        action_tokenizer=make_tokenizer(),
        return_vla_action_container=False,
    )
    policy.set_keys(action_chunk="action")
    policy(ToyTrackingEnv(1).reset())  # makes the lazy layers
    return policy


@torch.no_grad()
def judge(
    policy: Callable[[TensorDictBase], TensorDictBase],
    tolerance: float,
    *,
    episodes: int = 512,
    shuffled: bool = False,
) -> float:
    """Greedy success rate in the stock environment.

    Args:
        policy: writes tokens.
        tolerance: how near the target an action must come.
        episodes: how many, each with a target of its own.
        shuffled: show each episode another one's target.
    """
    base = ToyVLAEnv(
        action_dim=ACTION_DIM,
        state_dim=2 * ACTION_DIM,
        success_steps=SUCCESS_STEPS,
        success_tol=tolerance,
        batch_size=torch.Size([episodes]),
        seed=10**6,
    )
    decide = [MultiAction(stack_rewards=False), ActionTokenizerTransform(make_tokenizer())]
    env = TransformedEnv(base, Compose(*decide, SuccessReward(), StepCounter(max_steps=MAX_DECISIONS)))

    def shuffle(state: Tensor) -> Tensor:
        echo, target = state.split(ACTION_DIM, -1)
        return torch.cat([echo, target.roll(1, 0)], -1)

    shown = TensorDictModule(shuffle, in_keys=[STATE], out_keys=[STATE])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        acting = TensorDictSequential(shown, policy) if shuffled else policy
        rollout = env.rollout(MAX_DECISIONS, acting, break_when_any_done=False, break_when_all_done=True)
    return rollout["next", "success"].any(1).float().mean().item()


def train(tolerance: float, seed: int, setting: Setting, run_dir: Path) -> Result:
    """Train a new policy with GRPO for a fixed number of control steps, and judge it."""
    torch.manual_seed(seed)
    policy = make_policy()
    tenth = setting.total_timesteps // 10
    config = PPOConfig(
        total_timesteps=setting.total_timesteps,
        batch_size=512,
        traj_split_num=1,
        traj_mini_batch_size=48 * setting.group_size // 8,
        n_epochs=2,
        actor_lr=2e-3,
        max_grad_norm=1.0,
        val_interval=tenth,
        log_interval=tenth,
        save_interval=setting.total_timesteps,
    )
    validation = GroupCollector(
        ToyTrackingEnv(256, success_tol=tolerance), policy, exploration_type=ExplorationType.DETERMINISTIC
    )
    held_out = EpisodePlan.grid([0], range(10**6, 10**6 + 256))

    def validate() -> dict[str, float]:
        batch = validation.collect(held_out)
        return {"val/success_rate": batch["next", "success"].sum().item() / len(held_out)}

    plans = EpisodePlan.stream({0: range(100_000)}, groups=setting.groups, group_size=setting.group_size, seed=seed)
    logger = RunLogger(run_dir)
    trainer = PPOTrainer(
        config,
        GroupCollector(ToyTrackingEnv(512, success_tol=tolerance, seed=seed), policy, plans),
        AsymmetricClipPPOLoss(policy),
        GRPOAdvantage(keep_low=0.0, keep_high=1.0),
        torch.optim.Adam(policy.parameters(), config.actor_lr),
        logger,
        validate=validate,
    )
    # On one thread: what the wall clock says where nothing else is running.
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    rates = [row["time/rollout_decisions_per_second"] for row in logger.rows if row["update"] > 0]
    return Result(
        success=judge(policy, tolerance),
        control=judge(policy, tolerance, shuffled=True),
        seconds=seconds,
        decisions_per_second=statistics.median(rates),
        curve=[(int(row["env_steps"]), row["val/success_rate"]) for row in logger.rows if "val/success_rate" in row],
    )


def main() -> int:
    """Train, print a line and the curve of each run, and return 1 if a run missed what its setting asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerances", type=float, nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    for tolerance in arguments.tolerances:
        setting = SETTINGS[tolerance]
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as run_dir:
                result = train(tolerance, seed, setting, Path(run_dir))
            missed += not result.meets(setting)
            control = "" if setting.control is None else f" (at most {setting.control})"
            print(
                f"tolerance {tolerance}  seed {seed}  greedy {result.success:.3f} (at least {setting.success})  "
                f"control {result.control:.3f}{control}  {result.seconds:.0f} CPU s (at most {setting.seconds:.0f})  "
                f"{result.decisions_per_second:.0f} decisions/s collected"
                f"{'' if result.meets(setting) else '  MISSED'}"
            )
            print("    greedy by 1,000 control steps: " + "  ".join(f"{n // 1000}:{r:.2f}" for n, r in result.curve))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
