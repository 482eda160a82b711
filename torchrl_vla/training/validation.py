"""Validation: the policy judged between updates, on the same episodes each time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torchrl.envs import EnvBase

from torchrl_vla.config import TrainConfig
from torchrl_vla.distributed.ranks import ALONE, OneProcess
from torchrl_vla.envs import get_suite
from torchrl_vla.evaluation.protocol import evaluate, initial_states, spread_episodes
from torchrl_vla.evaluation.videos import choose_episodes, film
from torchrl_vla.modules import OpenVLAActor
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.progress import EpisodeBar

__all__ = ["Validation"]


class Validation:
    """Runs `val_episodes` episodes and returns their figures; films one success and one failure of them.

    Args:
        config: tasks, states, temperature and number of the episodes.
        actor: the policy, put back to its rollout temperature afterwards.
        envs: where the rollouts run too.
        logger: takes the films, and is told where training and validation share initial states.
        check: called after every decision; may raise to end the validation.
        ranks: the processes that share the episodes; each has the figures of all.
    """

    def __init__(
        self,
        config: TrainConfig,
        actor: OpenVLAActor,
        envs: Sequence[EnvBase],
        logger: RunLogger,
        check: Callable[[], None] | None = None,
        ranks: OneProcess = ALONE,
    ) -> None:
        self.config, self.actor, self.envs, self.logger = config, actor, envs, logger
        # One process that left would keep the others waiting: several stop after a validation, not in one.
        self.ranks, self.check = ranks, check if ranks.size == 1 else None
        ppo, suite = config.ppo, get_suite(config.ppo.task_suite)
        states = initial_states(suite, ppo.tasks, ppo.val_init_state_ids)
        trained_on = initial_states(suite, ppo.tasks, ppo.init_state_ids)
        if ppo.val_interval and any(set(states[task]) & set(trained_on[task]) for task in ppo.tasks):
            logger.print(
                "Training starts from the validations' initial states too: they say how the run goes, not how the "
                "policy does where it has not trained. --init-state-ids and --val-init-state-ids keep them apart."
            )
        self.instructions = {task: suite.task(task).instruction for task in ppo.tasks}
        self.temperature = ppo.eval_temperature
        if not config.actor.deterministic_eval and not self.temperature:
            self.temperature = ppo.rollout_temperature
        wanted = max(ppo.val_episodes, 1)
        self.plan = spread_episodes(ppo.tasks, states, wanted, repeat=self.temperature > 0)
        if len(self.plan) < wanted and ppo.val_interval:
            logger.print(
                f"Validations run {len(self.plan)} episodes, not val_episodes={wanted}: greedy ones from one initial "
                "state are nearly the same, so each is run once. More --val-init-state-ids or an --eval-temperature "
                "above 0 add some."
            )

    def __call__(self, env_steps: int) -> dict[str, float]:
        """Judge the policy as it is now.

        Args:
            env_steps: control steps collected so far, which the films are filed under.

        Returns:
            Figures named ``val/...``, and ``time/val_seconds``.
        """
        started, sampling = time.perf_counter(), self.actor.temperature
        self.actor.temperature = self.temperature or sampling
        try:
            report = evaluate(
                self.envs,
                self.actor,
                self.ranks.share(self.plan),
                task_suite=self.config.ppo.task_suite,
                instructions=self.instructions,
                greedy=self.temperature == 0,
                progress=EpisodeBar("validation", self.check),
            )
        finally:
            self.actor.temperature = sampling
        parts = self.ranks.gather(report)
        report = replace(
            report,
            episodes=[episode for part in parts for episode in part.episodes],
            actions=[actions for part in parts for actions in part.actions],
        )
        if self.config.ppo.val_videos and self.ranks.is_first:
            for video in film(report, choose_episodes(report.episodes, per_task=False), **self.config.ppo.simulation):
                outcome = "success" if video.episode.success else "failure"
                self.logger.log_video(f"val/{outcome}", video.frames, env_steps=env_steps)
        figures = {f"val/{name}": value for name, value in report.figures().items()}
        figures["val/mean_reward"] = self.config.ppo.reward_scale * report.total.rate
        figures |= {f"val/success_task_{task}": result.success.rate for task, result in report.tasks.items()}
        return figures | {"time/val_seconds": time.perf_counter() - started}
