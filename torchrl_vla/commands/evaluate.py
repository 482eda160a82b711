"""`torchrl-vla evaluate`: judge a policy by the standard protocol."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["EvaluateConfig", "main"]


@dataclass
class EvaluateConfig:
    """Run every task from fixed initial states, greedily, and report success with 95% intervals.

    Raises:
        ValueError: a value is out of range.
    """

    checkpoint: Annotated[str, tyro.conf.arg(aliases=["--pretrained-checkpoint"])]
    """Folder or hub id of the policy, such as RUN/policy."""
    task_suite: str = "libero_spatial"
    """LIBERO suite, or one of LIBERO-PRO's."""
    task_ids: list[int] | None = None
    """Tasks to run; None: all of the suite."""
    episodes_per_task: int = 50
    """Episodes per task, from its initial states in order; the protocol asks for 50."""
    init_state_ids: list[int] | None = None
    """Initial states to use; None: all of the task's."""
    num_envs: int = 8
    """Simulators run side by side."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy, as the protocol asks."""
    max_episode_steps: int | None = None
    """Horizon in control steps; None: the suite's own."""
    fidelity: Literal["exact", "fast"] = "exact"
    """exact: stock LIBERO's bits; fast: cheaper physics and pictures, not comparable with published figures."""
    proprio_format: Literal["axis_angle", "quaternion"] = "axis_angle"
    """What the policy was trained on."""
    num_images_in_input: int = 1
    """Cameras the policy looks through: 1 agentview, 2 with the wrist camera."""
    unnorm_key: str | None = None
    """Which action statistics of the checkpoint to use; None: the suite's."""
    device: str = "auto"
    """Device of the policy."""
    seed: int = 0
    """Seeds the simulator (the protocol's is 0) and, with a temperature, the sampling."""
    out: Path | None = None
    """Folder for report.json and episodes.csv; None: evaluations/SUITE-DATE-TIME."""

    def __post_init__(self) -> None:
        for name in ("episodes_per_task", "num_envs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}: 0 is greedy.")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    config = tyro.cli(EvaluateConfig, prog="torchrl-vla evaluate", args=arguments)

    import torch
    from tqdm import tqdm

    from torchrl_vla.config import EnvironmentConfig, OpenVLAActorConfig
    from torchrl_vla.envs import get_suite
    from torchrl_vla.envs.layout import make_env
    from torchrl_vla.evaluation.protocol import evaluate, initial_states, spread_episodes
    from torchrl_vla.training.devices import choose_device
    from torchrl_vla.training.folder import versions
    from torchrl_vla.training.policy import load_policy
    from torchrl_vla.training.progress import EpisodeBar

    suite = get_suite(config.task_suite)
    tasks = config.task_ids if config.task_ids is not None else list(range(len(suite.tasks)))
    EnvironmentConfig(task_suite=config.task_suite, task_ids=tasks, init_state_ids=config.init_state_ids)
    states = initial_states(suite, tasks, config.init_state_ids)
    plan = spread_episodes(tasks, states, config.episodes_per_task * len(tasks))
    out = config.out or Path("evaluations") / f"{config.task_suite}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (out / "report.json").exists():
        raise ValueError(f"{out} holds a report already: choose another --out.")
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    policy = load_policy(
        OpenVLAActorConfig(
            pretrained_checkpoint=config.checkpoint,
            unnorm_key=config.unnorm_key,
            num_images_in_input=config.num_images_in_input,
        ),
        task_suite=config.task_suite,
        temperature=config.temperature or 1.0,
        device=device,
        trainable=False,
    )
    env = make_env(
        config.task_suite,
        num_envs=min(config.num_envs, len(plan)),
        task_ids=tasks,
        chunk_size=policy.model.config.chunk_size,
        cameras=("agentview", "robot0_eye_in_hand")[: config.num_images_in_input],
        proprio_format=config.proprio_format,
        max_episode_steps=config.max_episode_steps,
        fidelity=config.fidelity,
        seed=config.seed,
    )
    print(f"{len(plan)} episodes of {config.task_suite}, policy {config.checkpoint} on {device}, report goes to {out}")
    try:
        report = evaluate(
            env,
            policy.actor,
            plan,
            task_suite=config.task_suite,
            instructions={task: suite.task(task).instruction for task in tasks},
            greedy=config.temperature == 0,
            progress=EpisodeBar("evaluation"),
            settings={
                "checkpoint": config.checkpoint,
                "init_states": "the official ones, in order"
                if config.init_state_ids is None
                else config.init_state_ids,
                "episodes_per_task": config.episodes_per_task,
                "temperature": config.temperature,
                "horizon": config.max_episode_steps or suite.horizon,
                "fidelity": config.fidelity,
                "seed": config.seed,
                "device": str(device),
                "command": sys.argv,
                "versions": versions(),
            },
        )
    finally:
        env.close()
    report.save(out)
    tqdm.write(str(report))
    print(f"Report: {out / 'report.json'}   Episodes: {out / 'episodes.csv'}")
