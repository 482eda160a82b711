"""The whole loop of `torchrl-vla bench gpu`: LIBERO rollouts of a policy, and one update from them."""

from __future__ import annotations

import time
from typing import Any

import torch

from torchrl_vla.bench.gpu_policy import Bench
from torchrl_vla.bench.measurements import Figure
from torchrl_vla.collectors import EpisodePlan, GroupCollector
from torchrl_vla.envs.factory import make_envs
from torchrl_vla.envs.rendering import configure_rendering

__all__ = ["measure"]

_SUITE, _WANTED = "libero_spatial", 22.0


def measure(bench: Bench) -> None:
    """Rollout of one episode per environment, each to its horizon or success, and one epoch over its decisions.

    A random policy hardly ever succeeds, which leaves nothing to learn from: here half of the decisions are taken to be
    good ones, so that the update has its usual work. One round before starts the environments and warms
    everything up.
    """
    bench.accelerate()
    configure_rendering()
    num_envs = bench.num_envs
    envs = make_envs(_SUITE, num_envs=num_envs, chunk_size=bench.model.config.chunk_size, task_ids=[0])
    try:
        step = bench.optimizer_step(traj_mini_batch_size=8)
        forward_seconds = _time_forwards(bench)
        collector = GroupCollector(envs, bench.policy.actor)
        for round_name in ("first", "second"):
            forward_seconds.clear()
            plan = EpisodePlan([(0, state) for state in range(num_envs)])
            started = time.perf_counter()
            batch = collector.collect(plan)
            rollout = time.perf_counter() - started
            batch.set("advantage", torch.where(torch.arange(len(batch)) % 2 == 0, 1.0, -1.0).unsqueeze(-1))
            started = time.perf_counter()
            figures = bench.update(step, batch)
            update = time.perf_counter() - started
            bench.report.note(
                f"loop, {round_name} round: decisions, rollout s, of it policy s, update s",
                [len(batch), round(rollout, 2), round(sum(forward_seconds), 2), round(update, 2)],
            )
            bench.report.note(
                f"loop, {round_name} round: micro-batch, recomputed, steps, KL, clipped",
                [
                    step.micro_batch.size, step.micro_batch.recompute, figures["train/optimizer_steps"],
                    figures["train/approx_kl"], figures["train/clipfrac"],
                ],
            )  # fmt: skip
        rate = len(batch) / (rollout + update)
        wanted = _WANTED if bench.on_gpu else None
        name = f"whole loop, {num_envs} environments, one epoch, decisions per second"
        bench.report.add(Figure(name, "/s", rate, more_is_better=True, wanted=wanted))
        bench.report.note("rollout, decisions per second", round(len(batch) / rollout, 1))
    finally:
        for env in envs:
            env.close(raise_if_closed=False)  # an error before its first use is the one to see


def _time_forwards(bench: Bench) -> list[float]:
    """Return a list that gets the seconds of every decision of the policy."""
    seconds: list[float] = []
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(time.perf_counter())

    def after(*_: Any) -> None:
        bench.synchronize()
        seconds.append(time.perf_counter() - started.pop())

    bench.policy.actor.register_forward_pre_hook(before)
    bench.policy.actor.register_forward_hook(after)
    return seconds
