"""GRPO (or PPO with GAE) for OpenVLA on LIBERO: the program that `torchrl-vla train` and `scripts/train.py` run.

    policy     OpenVLA's action-token logits as a ProbabilisticActor
    envs       LIBERO as TorchRL environments, in processes that are watched
    collector  whole groups of episodes, one batch per update
    buffer     a replay buffer; its transform GRPOAdvantage scores each group and drops those that teach nothing
    loss       ClipPPOLoss with two clip ratios, masked, over action tokens
    loop       collect, extend, step, push the weights, validate, log, save

To bring a part of your own, copy this file and change its line in `train`; `learn` takes any TorchRL collector, buffer
and loss. `examples/` has four such programs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.data import ListStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs.transforms import Transform
from torchrl.objectives.value import GAE
from tqdm import tqdm

from torchrl_vla.checkpoints.policy import save_policy
from torchrl_vla.collectors import EpisodePlan
from torchrl_vla.config import PPOConfig, TrainConfig
from torchrl_vla.distributed import ALONE, OneProcess, SharedBuffer, SharedCollector, join_ranks
from torchrl_vla.envs import get_suite
from torchrl_vla.envs.factory import make_envs
from torchrl_vla.evaluation.protocol import initial_states
from torchrl_vla.objectives import AsymmetricClipPPOLoss, EstimateAdvantage, GRPOAdvantage
from torchrl_vla.training.actor_critic import make_critic
from torchrl_vla.training.backward_pass import can_be_recorded
from torchrl_vla.training.figures import group_figures, nothing_to_learn, rollout_figures, update_figures
from torchrl_vla.training.logging import RunLogger, format_table
from torchrl_vla.training.micro_batch import trim_heap
from torchrl_vla.training.optimizer_step import OptimizerStep
from torchrl_vla.training.profiling import UpdateProfiler
from torchrl_vla.training.progress import EpisodeBar, RunProgress
from torchrl_vla.training.reference import ReferenceLogProb, reference_policy
from torchrl_vla.training.run import open_run
from torchrl_vla.training.run_checkpoints import RunCheckpoints, TrainableState
from torchrl_vla.training.run_folder import describe_run
from torchrl_vla.training.schedule import LearningRateSchedule
from torchrl_vla.training.start import load_for_training
from torchrl_vla.training.validation import Validation

__all__ = ["learn", "make_buffer", "train", "update"]


def train(config: TrainConfig) -> Path:
    """Train one policy from its start, or from the newest checkpoint, to the end, and return the run's folder.

    Raises:
        ValueError: an option does not fit the checkpoint, the suite or this machine; nothing long was started.
        TrainingDiverged: too many optimizer steps in a row were not finite.
    """
    ppo, suite = config.ppo, get_suite(config.ppo.task_suite)
    with ExitStack() as stack:
        ranks = stack.enter_context(join_ranks(ppo.device))  # torchrun's processes, or this one alone
        # -- policy: checked, loaded, adapters added; a value head if the advantage needs one ------------------------
        policy, device, head_device = load_for_training(config, ranks)
        critic = make_critic(policy, device) if ppo.advantage_estimator == "gae" else None

        folder, logger, stop = stack.enter_context(open_run(config, ranks))
        logger.print(f"{config.actor.pretrained_checkpoint} on {device}, preset {config.preset}, results in {folder}")
        profiler = stack.enter_context(UpdateProfiler(folder, config.profile))

        # -- environments and collector: groups of whole episodes, at least n_steps control steps per update ----------
        envs = make_envs(
            suite.name, task_ids=ppo.tasks, num_envs=ppo.num_envs, chunk_size=policy.model.config.chunk_size,
            image_size=ppo.camera_size, cameras=("agentview", "robot0_eye_in_hand")[: policy.model.config.num_images],
            proprio_format=ppo.proprio_format, max_episode_steps=ppo.max_episode_steps or suite.horizon,
            reward_scale=ppo.reward_scale, worker_timeout=ppo.worker_timeout, **ppo.simulation,
        )  # fmt: skip
        for each in envs:
            stack.callback(each.close, raise_if_closed=False)  # an error before its first use is the one to see
        starts = initial_states(suite, ppo.tasks, ppo.init_state_ids)
        collector = SharedCollector(
            envs, critic.rollout if critic else policy.actor,
            EpisodePlan.stream(starts, groups=1, group_size=ppo.group_size, seed=ppo.seed),
            min_control_steps=ppo.n_steps, seed=ppo.seed, bootstrap_at_horizon=ppo.bootstrap_at_horizon,
            progress=EpisodeBar("rollout", stop.check), ranks=ranks, pre_collect_hook=profiler.next_update,
        )  # fmt: skip

        # -- buffer and loss -----------------------------------------------------------------------------------------
        action_tokens = policy.processor.action_tokenizer
        loss = AsymmetricClipPPOLoss(
            policy.actor, critic.value_operator if critic else None,
            clip_ratio_low=ppo.clip_ratio_low, clip_ratio_high=ppo.clip_ratio_high, ratio_level=ppo.ratio_level,
            dual_clip=ppo.dual_clip, aggregation=ppo.aggregation, entropy_coeff=ppo.entropy_coef, kl_coeff=ppo.kl_coef,
            reference_context=reference_policy(policy.model) if ppo.kl_coef else None,
            reconstruction_coeff=ppo.reconstruction_coef,
            bin_centers=action_tokens.decode(torch.arange(action_tokens.n_bins)),
            critic_coeff=ppo.value_loss_coef if critic else None,
        ).to(device)  # fmt: skip

        advantage, reference = make_advantage(ppo), [ReferenceLogProb(loss)] if ppo.kl_coef else []
        several = ranks.size > 1
        buffer = SharedBuffer(advantage, *reference, ranks=ranks) if several else make_buffer(advantage, *reference)

        # -- optimizer and step --------------------------------------------------------------------------------------
        groups = [{"params": [p for p in policy.model.parameters() if p.requires_grad], "lr": ppo.actor_lr}]
        groups += [{"params": critic.to(head_device).value_head.parameters(), "lr": ppo.critic_lr}] if critic else []
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=device.type == "cuda")
        schedule = LearningRateSchedule(optimizer, warmup_steps=ppo.lr_warmup_steps, decay=ppo.lr_schedule)
        recorded = can_be_recorded(policy.model) and (critic is None or head_device == device)  # on one GPU
        step = OptimizerStep(
            loss, optimizer, ppo, schedule=schedule, device=device, report=logger.print,
            set_recompute=policy.model.gradient_checkpointing_enable,
            prepare=policy.actor.backbone.prepare if recorded else None, check=stop.agree, ranks=ranks,
        )  # fmt: skip

        # -- checkpoints ---------------------------------------------------------------------------------------------
        progress, in_4bit = RunProgress(), policy.model.is_loaded_in_4bit
        checkpoints = RunCheckpoints(
            folder / "checkpoints", keep=ppo.keep_checkpoints, writes=ranks.is_first,
            policy=TrainableState(policy.model), value_head=TrainableState(critic.value_head if critic else None),
            optimizer=optimizer, schedule=schedule, step=step, collector=collector, progress=progress,
            # Weights in 4 bits are rounded: `export` merges their adapters into the weights of the checkpoint.
            after_save=None if in_4bit else partial(save_policy, policy, folder / "policy"),
        )  # fmt: skip
        if config.resume:
            came_from = checkpoints.load_latest() or "its start, as it ended before its first checkpoint"
            logger.restore(progress.updates)
            logger.print(f"Resumed from {came_from}: {progress}.")
        if ranks.is_first:
            describe_run(config, folder)  # only now: options that do not fit the checkpoint do not stay
        judged = ppo.val_interval and ppo.val_episodes
        with checkpoints.kept_at_the_end(progress, logger.print):
            learn(
                ppo, collector, buffer, step, progress, logger, advantage=advantage, ranks=ranks,
                validate=Validation(config, policy.actor, envs, logger, stop.check, ranks) if judged else None,
                checkpoints=checkpoints,
            )  # fmt: skip
        where = f"`torchrl-vla export {folder} OUT`" if in_4bit else folder / "policy"
        logger.print(f"Done at {progress}. Policy: {where}   Figures: {logger.csv_path}   Curve: {logger.curve_path}")
    return folder


def make_advantage(ppo: PPOConfig) -> Transform:
    """Return the transform that scores what the buffer is filled with."""
    if ppo.advantage_estimator == "gae":
        # The rollout wrote the values, of the last observations too: no network is needed here.
        return EstimateAdvantage(GAE(gamma=ppo.gamma, lmbda=ppo.gae_lambda, value_network=None, average_gae=True))
    options = {name: getattr(ppo, name) for name in ("baseline", "verifier_gamma", "keep_low", "keep_high")}
    return GRPOAdvantage(ppo.advantage_estimator, **options)


def make_buffer(*transforms: Transform) -> TensorDictReplayBuffer:
    """Return a buffer of one update's decisions, each drawn once an epoch; its transforms work as they come in."""
    storage = ListStorage(max_size=2**31)  # keeps rows as they are: updates differ in size, and images are large
    buffer = TensorDictReplayBuffer(storage=storage, sampler=SamplerWithoutReplacement())
    for transform in reversed(transforms):  # what comes in meets the last one first
        buffer.append_transform(transform)
    return buffer


def learn(
    ppo: PPOConfig, collector: Iterable[TensorDictBase], buffer: Any, step: OptimizerStep, progress: RunProgress,
    logger: RunLogger, *, advantage: Any = None, policy: nn.Module | None = None,
    validate: Callable[[int], Mapping[str, float]] | None = None, checkpoints: RunCheckpoints | None = None,
    ranks: OneProcess = ALONE,
) -> None:  # fmt: skip
    """Collect, extend, step, push the weights, validate, log, save: to `total_timesteps`, or the collector's end.

    Args:
        ppo: how much is collected, how it is learned from, the intervals.
        collector: yields one update's decisions ``[T]``, episode after episode, or ``[N, T]``.
        buffer: a replay buffer, filled anew for each update; its transforms score the decisions, and may drop some.
        step: takes one optimizer step on a mini-batch.
        progress: how far the run has come; changed in place.
        logger: takes the figures.
        advantage: the buffer's transform; what its ``get_stats``, if it has one, says of groups is logged.
        policy: its weights go to a collector that has ``update_policy_weights_``, after each update.
        validate: judges the policy, given the control steps so far, and returns figures named ``val/...``.
        checkpoints: what the run can be resumed from.
        ranks: the processes that run this together.
    """
    total, batches, validated, saved = ppo.total_timesteps, iter(collector), -1, -1
    push_weights = getattr(collector, "update_policy_weights_", None)

    def conclude(metrics: dict[str, float], *, last: bool) -> None:
        """Validate, log and save what is due after an update; at an end, whatever it has not had yet."""
        nonlocal validated, saved
        success = None
        if validate and validated < progress.updates and (last or progress.passed(ppo.val_interval)):
            metrics |= validate(progress.env_steps)
            validated, success = progress.updates, metrics.get("val/success_rate")
        if metrics:
            logger.log(metrics, update=progress.updates, env_steps=progress.env_steps)
        if metrics and (last or success is not None or progress.passed(ppo.log_interval)):
            logger.print(format_table(metrics, f"{progress} of {total:,}"))
            logger.draw()
        best = success is not None and progress.is_best(success)
        if checkpoints and saved < progress.updates and (last or best or progress.passed(ppo.save_interval)):
            checkpoints.save(step=progress.env_steps, success=success)
            saved = progress.updates

    with tqdm(total=total, initial=progress.env_steps, desc="training", unit="step", position=0) as bar:
        if progress.updates == 0:
            conclude({}, last=True)  # how it does before it learns, and what an interrupted run goes on from
        while progress.env_steps < total:
            started = time.perf_counter()
            with checkpoints.rollout("collector") if checkpoints else nullcontext():
                batch = next(batches, None)
            if batch is None:
                logger.print(f"The collector ended after {progress}, of {total:,} wanted.")
                conclude({}, last=True)
                break
            metrics = rollout_figures(batch, time.perf_counter() - started, ranks)
            progress.count(int(metrics["rollout/env_steps"]))
            step.set_progress(progress.env_steps / total)
            metrics |= update(ppo, batch, buffer, step, advantage, episodes=int(metrics["rollout/num_trajectories"]))
            del batch  # its images, while the next are collected
            trim_heap()
            if push_weights:  # with none given, a collector made with a policy_factory would act with its first ones
                push_weights(*([TensorDict.from_module(policy).data] if policy else []))
            bar.update(min(progress.env_steps, total) - bar.n)
            conclude(metrics, last=progress.env_steps >= total)


def update(
    ppo: PPOConfig, batch: TensorDictBase, buffer: Any, step: OptimizerStep, advantage: Any = None, *, episodes: int = 0
) -> dict[str, float]:
    """Fill the buffer with a batch of so many episodes, step through it, and return the figures named ``train/...``."""
    started, episodes = time.perf_counter(), episodes or max(1, int(batch["next", "done"].sum()))
    getattr(advantage, "reset_stats", lambda: None)()
    buffer.extend(batch)
    stats: dict[str, float] = getattr(advantage, "get_stats", dict)()
    if not len(buffer):
        step.report(nothing_to_learn(stats))
        return group_figures(stats)
    kept, decisions = int(stats.get("kept_episodes", episodes)), len(buffer)
    parts = min(decisions, math.ceil(kept / ppo.traj_mini_batch_size))
    sizes = [decisions // parts + (part < decisions % parts) for part in range(parts)]  # none is small
    with tqdm(total=ppo.n_epochs * decisions, desc="update", unit="decision", position=1, leave=False) as bar:
        steps = [step(buffer.sample(n).exclude("index"), bar.update) for _ in range(ppo.n_epochs) for n in sizes]
    buffer.empty()  # its images, while the next are collected
    counts = {"decisions": decisions, "epochs": ppo.n_epochs, "episodes": episodes, "kept": kept}
    return group_figures(stats) | update_figures(steps, seconds=time.perf_counter() - started, **counts)
