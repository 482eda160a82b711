#!/usr/bin/env python3
"""Compare variants of the algorithm on ToyVLAEnv at tolerance 0.15: `python scripts/learning_benchmark.py OUT`.

One process per core and run, seed by seed, so that what is there after an interruption is whole seeds; a second start
goes on. Each run has the same budget of CPU time; the figures are the control steps and episodes until 0.95 of 256
held-out targets are hit greedily, and the share at the end. OUT gets a line per run, `runs.jsonl`, and the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TOLERANCE, GROUPS, VOCABULARY, CHUNK, DIM, SUCCESS_STEPS, DECISIONS = 0.15, 64, 64, 4, 2, 2, 6

DEFAULT = dict(
    estimator="grpo",
    baseline="group",
    lr=2e-3,
    epochs=2,
    mini_batch=96,
    group_size=16,
    low=0.2,
    high=0.28,
    entropy=0.0,
    temperature=1.0,
)
VARIANTS = {
    "default": {},
    "rloo": dict(estimator="rloo"),
    "running baseline": dict(baseline="running"),
    "rloo, running": dict(estimator="rloo", baseline="running"),
    "lr x0.1": dict(lr=2e-4),
    "lr x3": dict(lr=6e-3),
    "lr x10": dict(lr=2e-2),
    "1 epoch": dict(epochs=1),
    "4 epochs": dict(epochs=4),
    "10 epochs": dict(epochs=10),
    "mini-batch 24": dict(mini_batch=24),
    "mini-batch 48": dict(mini_batch=48),
    "mini-batch 384": dict(mini_batch=384),
    "clip 0.2, 0.2": dict(high=0.2),
    "clip 0.1, 0.1": dict(low=0.1, high=0.1),
    "clip 0.4, 0.56": dict(low=0.4, high=0.56),
    "temperature 0.7": dict(temperature=0.7),
    "temperature 1.6": dict(temperature=1.6),
    "groups of 8": dict(group_size=8),
    "entropy bonus 0.01": dict(entropy=0.01),
}


def run(variant: str, seed: int, steps: int, seconds: float) -> dict[str, Any]:
    """One run in this process."""
    import torch
    from torch import nn
    from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
    from torchrl.data.vla import UniformActionTokenizer
    from torchrl.envs.utils import ExplorationType
    from torchrl.modules.vla import TinyVLA

    from torchrl_vla.collectors import EpisodePlan, GroupCollector
    from torchrl_vla.envs.toy import ToyTrackingEnv
    from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    o = DEFAULT | VARIANTS[variant]
    policy = TinyVLA(
        action_dim=DIM,
        chunk_size=CHUNK,
        action_head="tokens",
        vocab_size=VOCABULARY,
        log_probs_mode="token",
        output_mode="both",
        action_tokenizer=UniformActionTokenizer(VOCABULARY, low=-1.0, high=1.0),
        return_vla_action_container=False,
    )
    policy.set_keys(action_chunk="action")
    policy(ToyTrackingEnv(1).reset())  # makes the lazy layers
    if o["temperature"] != 1:  # in rollouts and updates alike; the most likely token stays
        policy.head.register_forward_hook(lambda module, inputs, output: output / o["temperature"])
    env = ToyTrackingEnv(512, success_tol=TOLERANCE, seed=seed)
    sizes = dict(groups=GROUPS * 16 // o["group_size"], group_size=o["group_size"], seed=seed)
    plans = EpisodePlan.stream({0: range(100_000)}, **sizes)
    judge = GroupCollector(
        ToyTrackingEnv(256, success_tol=TOLERANCE), policy, exploration_type=ExplorationType.DETERMINISTIC
    )
    held_out = EpisodePlan.grid([0], range(10**6, 10**6 + 256))

    def greedy() -> float:
        return judge.collect(held_out)["next", "success"].sum().item() / len(held_out)

    loss = AsymmetricClipPPOLoss(policy, clip_ratio_low=o["low"], clip_ratio_high=o["high"], entropy_coeff=o["entropy"])
    advantage = GRPOAdvantage(o["estimator"], baseline=o["baseline"], keep_low=0.0, keep_high=1.0)
    optimizer = torch.optim.Adam(policy.parameters(), o["lr"])
    began, control, episodes, optimizer_steps = time.process_time(), 0, 0, 0
    curve, every, due, kl, clipped = [(0, 0, greedy())], steps / 36, steps / 36, [], []
    reached = None
    batches = iter(GroupCollector(env, policy, plans))
    while control < steps and time.process_time() - began < seconds:
        batch = next(batches)
        control += int(batch["next", "num_control_steps"].sum())
        episodes += int(batch["next", "done"].sum())
        advantage.reset_stats()
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(len(batch)),
            sampler=SamplerWithoutReplacement(),
            batch_size=1,
            transform=advantage,
        )
        buffer.extend(batch)
        kept = int(advantage.get_stats()["kept_episodes"])
        if kept and len(buffer):
            size = math.ceil(len(buffer) / math.ceil(kept / o["mini_batch"]))
            for _ in range(o["epochs"]):
                for first in range(0, len(buffer), size):
                    terms = loss(buffer.sample(min(size, len(buffer) - first)).exclude("index"))
                    total = sum(value for key, value in terms.items() if key.startswith("loss_"))
                    optimizer.zero_grad()
                    total.backward()
                    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                    optimizer.step()
                    optimizer_steps += 1
                    kl.append(terms["kl_approx"].item())
                    clipped.append(terms["clip_fraction"].item())
        if control >= due:
            due += every
            curve.append((control, episodes, greedy()))
            if reached is None and curve[-1][2] >= 0.95:
                reached = (control, episodes)
    last = [rate for _, _, rate in curve[-3:]]
    return dict(
        variant=variant,
        seed=seed,
        control_steps=control,
        episodes=episodes,
        optimizer_steps=optimizer_steps,
        cpu_seconds=round(time.process_time() - began, 1),
        reached=reached,
        final=greedy(),
        last=statistics.mean(last),
        kl=statistics.mean(kl) if kl else None,
        clipped=statistics.mean(clipped) if clipped else None,
        curve=curve,
        done=control >= steps,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Each variant in a row: means over its seeds, and what they range over."""
    measured = (
        "thousand control steps to 0.95",
        "reached by",
        "episodes to 0.95",
        "greedy at the end",
        "KL",
        "clipped",
    )
    names = ("variant", "seeds", *measured)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for name in VARIANTS:
        mine = [row for row in rows if row["variant"] == name]
        if not mine:
            continue
        steps = [row["reached"][0] / 1000 for row in mine if row["reached"]]
        episodes = [row["reached"][1] for row in mine if row["reached"]]
        final = [row["final"] for row in mine]
        cells = [
            name,
            f"{len(mine)}",
            f"{statistics.mean(steps):.0f} ({min(steps):.0f}-{max(steps):.0f})" if steps else "-",
            f"{len(steps)} of {len(mine)}",
            f"{statistics.mean(episodes):.0f}" if episodes else "-",
            f"{statistics.mean(final):.3f} ({min(final):.3f}-{max(final):.3f})",
            f"{statistics.mean(row['kl'] or 0 for row in mine):.4f}",
            f"{statistics.mean(row['clipped'] or 0 for row in mine):.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The runs that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Do the runs that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1_800_000, help="control steps at most")
    parser.add_argument("--seconds", type=float, default=150.0, help="CPU time at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help="this run alone, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one[0], int(arguments.one[1]), arguments.steps, arguments.seconds)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = arguments.out / "runs.jsonl"
    there = {(row["variant"], row["seed"]) for row in read(lines)}
    todo = [(name, seed) for seed in arguments.seeds for name in arguments.only if (name, seed) not in there]
    running: list[tuple[subprocess.Popen[str], str, int]] = []
    limits = ["--steps", str(arguments.steps), "--seconds", str(arguments.seconds)]
    print(f"{len(todo)} runs to do, {len(there)} there", flush=True)
    while todo or running:
        while todo and len(running) < arguments.processes:
            name, seed = todo.pop(0)
            command = [sys.executable, __file__, str(arguments.out), "--one", name, str(seed), *limits]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | _ONE_THREAD)
            running.append((process, name, seed))
        time.sleep(0.5)
        for process, name, seed in [each for each in running if each[0].poll() is not None]:
            running.remove((process, name, seed))
            printed, _ = process.communicate()
            if process.returncode:
                print(f"{name}, seed {seed} failed", flush=True)
                continue
            found = json.loads(printed.splitlines()[-1])
            with lines.open("a") as stream:
                stream.write(json.dumps(found) + "\n")
            (arguments.out / "table.md").write_text(table(read(lines)))
            print(f"{name}, seed {seed}: 0.95 after {found['reached']}, end {found['final']:.3f}", flush=True)
    print(table(read(lines)))


if __name__ == "__main__":
    main()
