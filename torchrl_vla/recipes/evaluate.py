"""Judge a checkpoint by the standard protocol: every task from fixed initial states, each episode once to its end."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from torchrl_vla.checkpoints.policy import load_policy, policy_mode
from torchrl_vla.collectors import EpisodePlan
from torchrl_vla.config import EnvironmentConfig, EvaluateConfig, OpenVLAActorConfig
from torchrl_vla.envs import get_suite
from torchrl_vla.envs.factory import make_envs
from torchrl_vla.envs.memory import count_models
from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.errors import UserError
from torchrl_vla.evaluation.comparison import check_same_problem, compare
from torchrl_vla.evaluation.curves import run_charts
from torchrl_vla.evaluation.html import write_html
from torchrl_vla.evaluation.protocol import evaluate, initial_states, spread_episodes
from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport, report_file
from torchrl_vla.evaluation.videos import choose_episodes, film, write_mp4
from torchrl_vla.files import check_output_folder
from torchrl_vla.training.devices import choose_device
from torchrl_vla.training.progress import EpisodeBar
from torchrl_vla.training.stopping import StopRequest
from torchrl_vla.versions import versions

__all__ = ["evaluate_checkpoint"]

#: The protocol's number per task.
_EPISODES = 50
_MODES = {
    "tokens": "action tokens, decoded in parallel",
    "autoregressive": "action tokens, decoded one after the other, one control step at a time",
    "l1": "its L1 head",
}


def evaluate_checkpoint(config: EvaluateConfig) -> EvaluationReport:
    """Run a policy's episodes, and write report, page and videos to `config.out`.

    Args:
        config: which policy, which episodes, and where the results go.

    Returns:
        The report: success by task, with intervals, and every episode.

    Raises:
        ValueError: something the user asked for is not available; nothing long was started then.
        Stopped: it was told to stop; what is done is kept, and it can be resumed.
    """
    with StopRequest("the decision at hand, and the report") as stop:
        return _evaluate(config, stop)


def _evaluate(config: EvaluateConfig, stop: StopRequest) -> EvaluationReport:
    out = config.out or Path("evaluations") / f"{config.task_suite}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_output_folder(out, "--out")
    if (out / "report.json").exists() and not config.resume:
        raise UserError(f"{out} holds a report already: choose another --out, or go on with it: --resume --out {out}")
    baseline = None
    if config.compare_with is not None:
        if report_file(Path(config.compare_with)) is not None:
            baseline = EvaluationReport.load(Path(config.compare_with))
            check_same_problem(baseline, config.task_suite.lower(), _settings(config, config.pretrained_checkpoint))
            plan = _plan(config, _acting(config, config.pretrained_checkpoint))
            if not {(e.task_id, e.init_state_id) for e in baseline.episodes} & {e[1:] for e in plan}:
                raise UserError(f"{config.compare_with} has no episode from any of these tasks and initial states.")
        else:
            # It is run later: what is wrong is told before anything long is started.
            _plan(config, _acting(config, config.compare_with))
    report = _judge(config, config.pretrained_checkpoint, out, stop)
    comparison = None
    if config.compare_with is not None:
        if baseline is None:
            baseline = _judge(config, config.compare_with, out / "baseline", stop)
        comparison = compare(baseline, report)
        report.save(out, comparison=comparison.to_dict())
    tqdm.write(str(report if comparison is None else comparison))
    videos = _record_videos(config, report, out / "videos", stop) if config.videos else []
    charts = run_charts(config.pretrained_checkpoint)
    write_html(out / "report.html", report, comparison=comparison, films=videos, charts=charts)
    for folder in (out, out / "baseline"):
        EvaluationReport.finish(folder)
    print(f"Page: {out / 'report.html'}   Figures: {out / 'report.json'}   Episodes: {out / 'episodes.csv'}")
    return report


class _Acting(NamedTuple):
    """How a policy acts and why, and whether it does the same whenever it sees the same."""

    mode: str
    reason: str
    greedy: bool


def _acting(config: EvaluateConfig, checkpoint: str) -> _Acting:

    trained = policy_mode(checkpoint)
    mode, reason = config.action_mode, "as --action-mode says"
    if mode == "auto":
        mode, reason = "tokens" if trained.name == "hybrid" else trained.name, trained.reason
    # The L1 head gives an action, not a distribution: there is nothing that a temperature would change.
    return _Acting(mode, reason, config.eval_temperature == 0 or mode == "l1")


def _plan(config: EvaluateConfig, acting: _Acting) -> EpisodePlan:
    """Return the episodes to run."""
    suite = get_suite(config.task_suite)
    tasks = config.task_ids if config.task_ids is not None else list(range(len(suite.tasks)))
    states = initial_states(suite, tasks, config.init_state_ids)
    wanted = config.episodes_per_task
    scarce = min(tasks, key=lambda task: len(states[task]))
    fewest = len(states[scarce])
    if acting.greedy and wanted is not None and wanted > fewest:
        sampling = "" if acting.mode == "l1" else ", or a --temperature above 0"
        raise UserError(
            f"episodes_per_task={wanted} is more than the {fewest} initial states of task {scarce}, and greedy "
            f"episodes from one are nearly the same: allowed are up to {fewest}, more states (--init-state-ids, or "
            f"others with --sampled-init-states SEED){sampling}. Left out, each task runs up to {_EPISODES} of its own."
        )
    several_models = count_models(suite.name, len(tasks)) > 1
    return spread_episodes(
        tasks,
        states,
        (wanted or _EPISODES) * len(tasks),
        repeat=wanted is not None and not acting.greedy,
        task_by_task=several_models,
    )


def _settings(config: EvaluateConfig, checkpoint: str) -> dict[str, Any]:
    """Return what the report says of how it was made; the policy's own part is added when it is loaded."""
    simulation = config.simulation
    return {
        "checkpoint": checkpoint,
        "init_states": config.initial_states,
        "sampled_init_states": simulation["sampled_init_states"],
        "temperature": config.eval_temperature,
        "horizon": config.max_episode_steps or get_suite(config.task_suite).horizon,
        "fidelity": config.fidelity,
        "fixture_seed": simulation["seed"],
        "seed": config.seed,
        "command": sys.argv,
        "versions": versions(),
    }


def _done(out: Path, suite: str, settings: dict[str, Any]) -> EvaluationReport:
    """Return the report of an interrupted evaluation.

    Raises:
        ValueError: it was made with other settings.
    """
    report = EvaluationReport.load_part(out)
    before = {"task_suite": report.task_suite, **report.settings}
    now = json.loads(json.dumps({"task_suite": suite, **settings}, default=str))  # as it is read back
    changed = [f"{name} from {before.get(name)!r} to {now[name]!r}" for name in now if now[name] != before.get(name)]
    if changed:
        raise UserError(
            f"{out} was begun otherwise, and one report is of one kind of episode; {', '.join(changed)} would change. "
            "Repeat the first command with --resume, or choose another --out."
        )
    return report


def _judge(config: EvaluateConfig, checkpoint: str, out: Path, stop: StopRequest) -> EvaluationReport:
    """Load a policy, run its episodes, and write their report; those that an interrupted report has are not run."""
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
        temperature=config.eval_temperature or 1.0,
        device=device,
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        trainable=False,
        autoregressive=acting.mode == "autoregressive",
        read_task_ids=tasks,
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
    counts = Counter(episode.task_id for episode in plan)
    least, most = min(counts.values()), max(counts.values())
    per_task = str(most) if least == most else f"{least} to {most}"
    print(
        f"{len(plan)} episodes of {suite.name}, {per_task} per task; policy {checkpoint} on {device}, report in {out}"
    )
    print(f"It acts by {_MODES[acting.mode]}: {acting.reason}.")
    if config.sampled_init_states is not None:
        print("Initial states are drawn where that was not done yet: some seconds per task.")
    settings = _settings(config, checkpoint)
    settings |= {
        "action_mode": acting.mode,
        "proprio_format": proprio_format,
        "renderer": renderer,
        "device": str(device),
        "dtype": str(policy.model.language_model.dtype).removeprefix("torch."),
        "planned_episodes": len(plan),
        "episodes_per_task": most if least == most else {str(task): count for task, count in sorted(counts.items())},
    }

    def keep(part: EvaluationReport) -> None:
        part.save_part(out)
        tqdm.write(f"{part.total} so far, of {len(plan)} planned: kept in {out}")

    try:
        done = None
        if config.resume and report_file(out / "report.json") is not None:
            done = _done(out, suite.name, {name: value for name, value in settings.items() if name != "command"})
            print(f"Going on after {len(done.episodes)} episodes.")
        report = evaluate(
            envs,
            policy.actor,
            plan,
            task_suite=suite.name,
            instructions={task: suite.task(task).instruction for task in tasks},
            greedy=acting.greedy,
            progress=EpisodeBar("evaluation"),
            settings=settings,
            save=keep,
            done=done,
            stop=lambda: stop.received is not None,
        )
        if report.episodes:
            report.save_part(out)
        if len(report.episodes) < len(plan):
            print(f"Ended early. To go on, repeat the command with --resume --out {out}")
            stop.check()
        return report
    finally:
        for env in envs:
            env.close(raise_if_closed=False)  # an error before its first use is the one to see


def _record_videos(
    config: EvaluateConfig, report: EvaluationReport, folder: Path, stop: StopRequest
) -> list[tuple[EpisodeResult, Path]]:
    """Record one success and one failure of each task: the episodes and the files."""
    chosen = choose_episodes(report.episodes)
    videos = []
    for video in tqdm(film(report, chosen, **config.simulation), total=len(chosen), desc="videos", unit="episode"):
        outcome = "success" if video.episode.success else "failure"
        path = folder / f"task{video.episode.task_id}-state{video.episode.init_state_id}-{outcome}.mp4"
        write_mp4(path, video.frames)
        videos.append((video.episode, path))
        stop.check()
    return videos
