"""`torchrl-vla evaluate`: judge a policy by the standard protocol."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from torchrl_vla.envs.processes import prepare_processes

if TYPE_CHECKING:
    from torchrl_vla.collectors import EpisodePlan
    from torchrl_vla.evaluation.report import EvaluationReport

__all__ = ["EvaluateConfig", "main"]

#: The protocol's number per task.
_EPISODES = 50
_MODES = {
    "tokens": "action tokens, decoded in parallel",
    "autoregressive": "action tokens, decoded one after the other, one control step at a time",
    "l1": "its L1 head",
}


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
    episodes_per_task: int | None = None
    """Episodes per task, from its initial states in order; None: 50, as the protocol asks, or one from each state where
    there are fewer. Greedy episodes run no state twice; with a temperature, states start over."""
    init_state_ids: list[int] | None = None
    """Initial states to use; None: all of the task's."""
    init_states: Literal["official", "sampled"] = "official"
    """official: those of the benchmark; sampled: as many others, drawn from the tasks' regions with the seed and
    numbered from 0 too: none is official, but they are those of `demos --sampled-init-states` with the same seed."""
    compare_with: str | None = None
    """Evaluation to compare with, on the same initial states: a folder with a report.json, or another checkpoint, which
    is then evaluated too."""
    num_envs: int = 8
    """Simulators run side by side."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy, as the protocol asks."""
    max_episode_steps: int | None = None
    """Horizon in control steps; None: the suite's own."""
    fidelity: Literal["exact", "fast"] = "exact"
    """exact: stock LIBERO's bits; fast: cheaper physics and pictures, not comparable with published figures."""
    proprio_format: Literal["auto", "axis_angle", "quaternion"] = "auto"
    """How the policy reads the robot's state; auto: as it was trained, and axis_angle where its folder does not say."""
    num_images_in_input: int = 1
    """Cameras the policy looks through: 1 agentview, 2 with the wrist camera."""
    unnorm_key: str | None = None
    """Which action statistics of the checkpoint to use; None: the suite's."""
    action_mode: Literal["auto", "tokens", "l1", "autoregressive"] = "auto"
    """tokens: chunks of action tokens, decoded in parallel (OpenVLA-OFT); l1: the L1 head; autoregressive: one token
    after the other, one control step at a time (base OpenVLA); auto: as the checkpoint was trained."""
    device: str = "auto"
    """Device of the policy."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto: as they are stored, and float32 on a CPU. Runs without adapters store float32."""
    worker_timeout: float = 120.0
    """Seconds after which a simulating process that does not answer is replaced and its episodes run again; five times
    as long while it starts and resets."""
    seed: int = 0
    """Seeds the poses of fixtures (the protocol's is 0; with sampled initial states they stay so), the draw of sampled
    initial states and, with a temperature, the sampling of actions."""
    videos: bool = True
    """Film one success and one failure of each task."""
    out: Path | None = None
    """Folder for report.html, report.json, episodes.csv and videos; None: evaluations/SUITE-DATE-TIME."""

    def __post_init__(self) -> None:
        for name in ("episodes_per_task", "num_envs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not self.worker_timeout > 0:
            raise ValueError(f"worker_timeout must be positive, got {self.worker_timeout}: it is in seconds.")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}: 0 is greedy.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")

    @property
    def simulation(self) -> dict[str, Any]:
        """What makes the same initial state and the same actions the same episode."""
        sampled = self.init_states == "sampled"
        return {
            "fidelity": self.fidelity,
            "seed": 0 if sampled else self.seed,
            "sampled_init_states": self.seed if sampled else None,
        }

    @property
    def initial_states(self) -> str:
        """The initial states in words."""
        which = (
            "from the first on"
            if self.init_state_ids is None
            else "numbers " + ", ".join(map(str, self.init_state_ids))
        )
        if self.init_states == "sampled":
            return (
                f"sampled from the tasks' regions with seed {self.seed}, {which}; none is official, and they are those "
                f"of demos --sampled-init-states {self.seed}"
            )
        return f"the official ones, {which}"


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    config = tyro.cli(EvaluateConfig, prog="torchrl-vla evaluate", args=arguments)

    from tqdm import tqdm

    from torchrl_vla.evaluation.comparison import check_same_problem, compare
    from torchrl_vla.evaluation.curves import run_charts
    from torchrl_vla.evaluation.html import write_html
    from torchrl_vla.evaluation.report import EvaluationReport, report_file

    out = config.out or Path("evaluations") / f"{config.task_suite}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (out / "report.json").exists():
        raise ValueError(f"{out} holds a report already: choose another --out.")
    if config.num_envs > 1:
        prepare_processes()
    baseline = None
    if config.compare_with is not None:
        if report_file(Path(config.compare_with)) is not None:
            baseline = EvaluationReport.load(Path(config.compare_with))
            check_same_problem(baseline, config.task_suite.lower(), _settings(config, config.checkpoint))
            plan = _plan(config, _acting(config, config.checkpoint))
            if not {(e.task_id, e.init_state_id) for e in baseline.episodes} & {e[1:] for e in plan}:
                raise ValueError(f"{config.compare_with} has no episode from any of these tasks and initial states.")
        else:
            # It is run later: what is wrong is told before anything long is started.
            _plan(config, _acting(config, config.compare_with))
    report = _judge(config, config.checkpoint, out)
    report.save(out)
    comparison = None
    if config.compare_with is not None:
        if baseline is None:
            baseline = _judge(config, config.compare_with, out / "baseline")
            baseline.save(out / "baseline")
        comparison = compare(baseline, report)
        report.save(out, comparison=comparison.to_dict())
    tqdm.write(str(report if comparison is None else comparison))
    films = _film(config, report, out / "videos") if config.videos else []
    write_html(out / "report.html", report, comparison=comparison, films=films, charts=run_charts(config.checkpoint))
    print(f"Page: {out / 'report.html'}   Figures: {out / 'report.json'}   Episodes: {out / 'episodes.csv'}")


class _Acting(NamedTuple):
    """How a policy acts and why, and whether it does the same whenever it sees the same."""

    mode: str
    reason: str
    greedy: bool


def _acting(config: EvaluateConfig, checkpoint: str) -> _Acting:
    from torchrl_vla.checkpoints.policy import policy_mode

    trained = policy_mode(checkpoint)
    mode, reason = config.action_mode, "as --action-mode says"
    if mode == "auto":
        mode, reason = "tokens" if trained.name == "hybrid" else trained.name, trained.reason
    # The L1 head gives an action, not a distribution: there is nothing that a temperature would change.
    return _Acting(mode, reason, config.temperature == 0 or mode == "l1")


def _plan(config: EvaluateConfig, acting: _Acting) -> EpisodePlan:
    """The episodes to run."""
    from torchrl_vla.config import EnvironmentConfig
    from torchrl_vla.envs import get_suite
    from torchrl_vla.envs.memory import count_models
    from torchrl_vla.evaluation.protocol import initial_states, spread_episodes

    suite = get_suite(config.task_suite)
    tasks = config.task_ids if config.task_ids is not None else list(range(len(suite.tasks)))
    EnvironmentConfig(task_suite=config.task_suite, task_ids=tasks, init_state_ids=config.init_state_ids)
    states = initial_states(suite, tasks, config.init_state_ids)
    scarce = min(tasks, key=lambda task: len(states[task]))
    fewest = len(states[scarce])
    wanted = min(_EPISODES, fewest) if config.episodes_per_task is None else config.episodes_per_task
    if acting.greedy and wanted > fewest:
        sampling = "" if acting.mode == "l1" else ", or a --temperature above 0"
        raise ValueError(
            f"episodes_per_task={wanted} is more than the {fewest} initial states of task {scarce}, and greedy "
            f"episodes from one are nearly the same: allowed are up to {fewest}, more states (--init-state-ids, or "
            f"others with --init-states sampled){sampling}."
        )
    several_models = count_models(suite.name, len(tasks)) > 1
    return spread_episodes(tasks, states, wanted * len(tasks), repeat=not acting.greedy, task_by_task=several_models)


def _settings(config: EvaluateConfig, checkpoint: str) -> dict[str, Any]:
    """What the report says of how it was made; the policy's own part is added when it is loaded."""
    from torchrl_vla.envs import get_suite
    from torchrl_vla.versions import versions

    simulation = config.simulation
    return {
        "checkpoint": checkpoint,
        "init_states": config.initial_states,
        "sampled_init_states": simulation["sampled_init_states"],
        "temperature": config.temperature,
        "horizon": config.max_episode_steps or get_suite(config.task_suite).horizon,
        "fidelity": config.fidelity,
        "fixture_seed": simulation["seed"],
        "seed": config.seed,
        "command": sys.argv,
        "versions": versions(),
    }


def _judge(config: EvaluateConfig, checkpoint: str, out: Path) -> EvaluationReport:
    """Load a policy and run its episodes."""
    import torch
    from tqdm import tqdm

    from torchrl_vla.checkpoints.policy import load_policy
    from torchrl_vla.config import EnvironmentConfig, OpenVLAActorConfig
    from torchrl_vla.envs import get_suite
    from torchrl_vla.envs.factory import make_envs
    from torchrl_vla.envs.rendering import configure_rendering
    from torchrl_vla.evaluation.protocol import evaluate
    from torchrl_vla.training.devices import choose_device
    from torchrl_vla.training.progress import EpisodeBar

    suite, acting = get_suite(config.task_suite), _acting(config, checkpoint)
    plan = _plan(config, acting)
    tasks = sorted({episode.task_id for episode in plan})
    device = choose_device(config.device)
    renderer = configure_rendering()  # what is missing is told before a policy is loaded
    torch.manual_seed(config.seed)
    policy = load_policy(
        OpenVLAActorConfig(
            pretrained_checkpoint=checkpoint,
            load_l1_action_head=acting.mode == "l1",
            use_tokenized_actions=acting.mode != "l1",
            unnorm_key=config.unnorm_key or suite.base,
            num_images_in_input=config.num_images_in_input,
        ),
        task_suite=config.task_suite,
        temperature=config.temperature or 1.0,
        device=device,
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        trainable=False,
        autoregressive=acting.mode == "autoregressive",
        read_task_ids=True,
        proprio_format=None if config.proprio_format == "auto" else config.proprio_format,
    )
    policy.share_prompt_length(suite.task(task).instruction for task in tasks)
    # Released checkpoints, which do not say it, were trained on the default.
    proprio_format = policy.model.config.proprio_format or EnvironmentConfig().proprio_format
    envs = make_envs(
        config.task_suite,
        num_envs=min(config.num_envs, len(plan)),
        task_ids=tasks,
        chunk_size=policy.model.config.chunk_size,
        cameras=("agentview", "robot0_eye_in_hand")[: config.num_images_in_input],
        proprio_format=proprio_format,
        max_episode_steps=config.max_episode_steps,
        worker_timeout=config.worker_timeout,
        **config.simulation,
    )
    per_task = len(plan) // len(tasks)
    print(
        f"{len(plan)} episodes of {suite.name}, {per_task} per task; policy {checkpoint} on {device}, report in {out}"
    )
    print(f"It acts by {_MODES[acting.mode]}: {acting.reason}.")
    if config.init_states == "sampled":
        print("Initial states are drawn where that was not done yet: some seconds per task.")
    settings = _settings(config, checkpoint)
    settings |= {
        "action_mode": acting.mode,
        "proprio_format": proprio_format,
        "renderer": renderer,
        "device": str(device),
        "dtype": str(policy.model.language_model.dtype).removeprefix("torch."),
        "planned_episodes": len(plan),
        "episodes_per_task": per_task,
    }

    def keep(part: EvaluationReport) -> None:
        part.save(out)
        tqdm.write(f"{part.total} so far, of {len(plan)} planned: kept in {out}")

    try:
        return evaluate(
            envs,
            policy.actor,
            plan,
            task_suite=suite.name,
            instructions={task: suite.task(task).instruction for task in tasks},
            greedy=acting.greedy,
            progress=EpisodeBar("evaluation"),
            settings=settings,
            save=keep,
        )
    finally:
        for env in envs:
            env.close(raise_if_closed=False)  # an error before its first use is the one to see


def _film(config: EvaluateConfig, report: EvaluationReport, folder: Path) -> list[tuple[Any, Path]]:
    """Films of one success and one failure of each task: the episodes and the files."""
    from tqdm import tqdm

    from torchrl_vla.evaluation.videos import choose_episodes, film, write_mp4

    chosen = choose_episodes(report.episodes)
    films = []
    for video in tqdm(film(report, chosen, **config.simulation), total=len(chosen), desc="videos", unit="episode"):
        outcome = "success" if video.episode.success else "failure"
        path = folder / f"task{video.episode.task_id}-state{video.episode.init_state_id}-{outcome}.mp4"
        write_mp4(path, video.frames)
        films.append((video.episode, path))
    return films
