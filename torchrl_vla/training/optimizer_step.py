"""The training loop: collect whole episodes, learn from them, validate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.data import SamplerWithoutReplacement, TensorDictReplayBuffer, TensorStorage
from torchrl.objectives import LossModule
from tqdm import tqdm

from torchrl_vla.config import PPOConfig
from torchrl_vla.modules.openvla.graphs import GraphRecorder
from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage
from torchrl_vla.objectives.combining import combine
from torchrl_vla.training.backward_pass import BackwardPass, RecordedPass
from torchrl_vla.training.logging import RunLogger, format_table
from torchrl_vla.training.micro_batch import MicroBatch, free_memory, trim_heap

__all__ = ["PPOTrainer", "TrainingDiverged"]


class TrainingDiverged(RuntimeError):
    """Too many optimizer steps in a row had a loss or gradient that is not finite."""


class PPOTrainer:
    """Runs PPO/GRPO on whatever collector, loss and advantage it is given.

    Every part is TorchRL's interface, so that any of them can be TorchRL's own: the collector is an iterable of
    TensorDicts (:class:`~torchrl_vla.collectors.GroupCollector`, :class:`torchrl.collectors.Collector`), the loss a
    ``LossModule``, the advantage a :class:`~torchrl_vla.objectives.GRPOAdvantage` or a value estimator such as GAE.

    Args:
        config: the algorithm's parameters.
        collector: yields one update's decisions ``[T]``, episode after episode, or ``[..., T]`` with one environment's
            decisions per row. GRPO compares whole episodes: with it, a row must not end within one.
        loss: its terms named ``loss_*`` are summed and differentiated.
        advantage: writes ``advantage`` into a batch, and may drop decisions that teach nothing.
        optimizer: over the loss's trainable parameters; its learning rates are reached after `lr_warmup_steps`.
        logger: takes the figures.

    Keyword Args:
        validate: judges the policy and returns figures named ``val/...``; None: no validation.
        save: writes a checkpoint, given the trainer; None: no checkpoints.
        device: where the loss runs.
        set_recompute: tells the policy which share of its layers to compute again in the backward pass; None if it
            cannot.
        prepare: for a policy whose passes can be recorded and replayed on a GPU: does ahead what of them needs the
            host; None launches them as any loss's.

    Examples:
        See `scripts/toy_vla.py` for a complete one on TorchRL's ``ToyVLAEnv``.
    """

    def __init__(
        self,
        config: PPOConfig,
        collector: Iterable[TensorDictBase],
        loss: LossModule,
        advantage: GRPOAdvantage | Callable[[TensorDictBase], TensorDictBase],
        optimizer: torch.optim.Optimizer,
        logger: RunLogger,
        *,
        validate: Callable[[], Mapping[str, float]] | None = None,
        save: Callable[[PPOTrainer], None] | None = None,
        device: torch.device | str = "cpu",
        set_recompute: Callable[[float], None] | None = None,
        prepare: Callable[[TensorDictBase], TensorDictBase] | None = None,
    ) -> None:
        self.config = config
        self.collector = collector
        self.loss = loss
        self.optimizer = optimizer
        self.logger = logger
        self.device = torch.device(device)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Those of the configuration; an optimizer's state would bring back those of the run that wrote it.
        self.learning_rates = [group["lr"] for group in optimizer.param_groups]
        self.advantage = advantage
        self.micro_batch = MicroBatch(
            config.batch_size, config.recompute, memory_gb=config.memory_gb, set_recompute=set_recompute
        )
        self.backward_pass = BackwardPass(loss, optimizer, self.device)
        if prepare is not None and isinstance(loss, AsymmetricClipPPOLoss):
            self.backward_pass = RecordedPass(loss, optimizer, self.device, prepare, GraphRecorder())
        self.updates = 0
        self.env_steps = 0
        self.optimizer_steps = 0
        self.bad_steps = 0
        self._validate = validate if config.val_interval and config.val_episodes else None
        self._save = save

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come."""
        names = ("updates", "env_steps", "optimizer_steps", "bad_steps")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        for name in self.state_dict():
            setattr(self, name, int(state[name]))

    def latest(self, figure: str, default: float) -> float:
        """The newest value of a figure that was logged, or the default if there is none."""
        values = [row[figure] for row in self.logger.rows if figure in row]
        return values[-1] if values else default

    def train(self) -> None:
        """Run to `total_timesteps`, or to the collector's end, with a last validation, log row and checkpoint.

        Raises:
            TrainingDiverged: `max_bad_updates` optimizer steps in a row were not finite.
        """
        config, total = self.config, self.config.total_timesteps
        if self.updates == 0 and self._validate is not None:
            self._log(self._timed_validation(), "before training")
        batches = iter(self.collector)
        metrics: dict[str, float] = {}  # those of the last update, until they are logged
        validated = saved = True
        with tqdm(total=total, initial=self.env_steps, desc="training", unit="step", position=0) as bar:
            while self.env_steps < total:
                started = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    self.logger.print(f"The collector ended after {self.env_steps:,} of {total:,} control steps.")
                    if self._validate is not None and not validated:
                        metrics |= self._timed_validation()
                    if metrics:
                        self._log(metrics, f"update {self.updates}, {self.env_steps:,} of {total:,} control steps")
                    if self._save is not None and not saved:
                        self._save(self)
                    break
                seconds = time.perf_counter() - started
                metrics = self._rollout_metrics(batch, seconds)
                before = self.env_steps
                self.env_steps += int(metrics["rollout/env_steps"])
                self.updates += 1
                metrics |= self.update(batch)
                del batch  # its images, while the next batch is collected
                trim_heap()
                done = self.env_steps >= total
                validated = self._validate is not None and (
                    done or _passed(config.val_interval, before, self.env_steps)
                )
                if validated:
                    metrics |= self._timed_validation()
                bar.update(min(self.env_steps, total) - min(before, total))
                if done or validated or _passed(config.log_interval, before, self.env_steps):
                    self._log(metrics, f"update {self.updates}, {self.env_steps:,} of {total:,} control steps")
                    metrics = {}
                saved = done or _passed(config.save_interval, before, self.env_steps)
                if self._save is not None and saved:
                    self._save(self)

    def update(self, batch: TensorDictBase) -> dict[str, float]:
        """Learn from one batch of complete episodes.

        Args:
            batch: decisions as the collector yields them.

        Returns:
            Figures named ``train/...``, averaged over the optimizer steps.

        Raises:
            ValueError: rows that end within an episode, for GRPO.
        """
        started = time.perf_counter()
        episodes = max(1, int(batch["next", "done"].sum()))
        data, kept, metrics = self._score(batch)
        if data is None:
            return metrics
        buffer = TensorDictReplayBuffer(
            storage=TensorStorage(data),
            sampler=SamplerWithoutReplacement(),
            batch_size=math.ceil(len(data) / math.ceil(kept / self.config.traj_mini_batch_size)),
        )
        steps = []
        total = self.config.n_epochs * len(data)
        with tqdm(total=total, desc="update", unit="decision", position=1, leave=False) as bar:
            for _ in range(self.config.n_epochs):
                for minibatch in buffer:
                    steps.append(self._optimizer_step(minibatch, bar))
        seconds = time.perf_counter() - started
        metrics |= {f"train/{k}": float(torch.stack([s[k] for s in steps]).nanmean()) for k in steps[0]}
        metrics |= {
            "train/decisions": len(data),
            "train/episodes": kept,
            "train/dropped_episodes": episodes - kept,
            "train/optimizer_steps": len(steps),
            "time/update_seconds": seconds,
            "time/update_decisions_per_second": total / seconds,
        }
        return metrics

    def _score(self, batch: TensorDictBase) -> tuple[TensorDictBase | None, int, dict[str, float]]:
        """What to learn from, flat, with advantages, or None if nothing teaches something; and of how many episodes."""
        if not isinstance(self.advantage, GRPOAdvantage):
            # Before rows are put one after the other: an estimator looks along time, and a row may be cut.
            scored = self.advantage(batch).reshape(-1)
            return scored, max(1, int(scored["next", "done"].sum())), {}
        if batch.ndim > 1 and not batch["next", "done"][..., -1, :].all():
            raise ValueError(
                f"GRPO compares whole episodes, and of the collector's rows {list(batch.shape[:-1])} some end within "
                "one. Collect whole ones: GroupCollector, or TorchRL's Collector with trajs_per_batch=... and "
                'traj_format="cat"; or use advantage_estimator=gae.'
            )
        self.advantage.reset_stats()
        scored = self.advantage.inv(batch.reshape(-1))
        stats = self.advantage.get_stats()
        metrics = {"rollout/groups": stats["groups"], "rollout/groups_kept": stats["kept"]}
        metrics |= {f"rollout/groups_{name}": value for name, value in stats.items() if name.startswith("dropped_")}
        if scored is None:
            self.logger.print(
                f"No group had both outcomes ({stats['dropped_all_failed']} failed throughout, "
                f"{stats['dropped_all_succeeded']} succeeded throughout, {stats['dropped_out_of_bounds']} outside the "
                f"bounds, {stats['dropped_incomplete']} with too few whole episodes): there is nothing to learn "
                "from in this update, and the policy stays as it is."
            )
        return scored, int(stats["kept_episodes"]), metrics

    def _optimizer_step(self, minibatch: TensorDictBase, bar: tqdm) -> dict[str, torch.Tensor]:
        """One optimizer step, its gradient accumulated over micro-batches; the figures stay on the device."""
        counts = None
        if isinstance(self.loss, AsymmetricClipPPOLoss):
            counts = self.loss.count_valid(minibatch).to(self.device)
        if not self.micro_batch.chosen:
            self._choose_micro_batch(minibatch, counts)
        while (sums := self._accumulate(minibatch, bar, counts)) is None:
            self._halve_micro_batch()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self._step_if_finite(torch.isfinite(norm) & torch.isfinite(sums["loss"]))
        return {_FIGURES.get(name, name): value for name, value in sums.items()} | {"grad_norm": norm.detach().float()}

    def _accumulate(
        self, minibatch: TensorDictBase, bar: tqdm, counts: TensorDictBase | None
    ) -> dict[str, torch.Tensor] | None:
        """The gradient of a mini-batch, and its figures; None, and no gradient, if memory runs out."""
        self.backward_pass.zero_grad()
        parts: list[dict[str, torch.Tensor]] = []
        shares: list[float] = []
        rows, done = self.micro_batch.rows(len(minibatch), self.config.traj_split_num), 0
        try:
            for micro in minibatch.split(rows):
                # Ours divides by the mini-batch's counts itself; a stock loss is a mean over the micro-batch.
                shares.append(len(micro) / len(minibatch) if counts is None else 1.0)
                parts.append(self.backward_pass(micro, rows=rows, scale=shares[-1], counts=counts))
                done += len(micro)
                bar.update(len(micro))
        except torch.OutOfMemoryError:
            bar.update(-done)
            return None
        if isinstance(self.loss, AsymmetricClipPPOLoss):
            return combine(parts)
        weights = torch.tensor(shares, device=self.device)
        return {name: weights @ torch.stack([part[name] for part in parts]) for name in parts[0]}

    def _choose_micro_batch(self, minibatch: TensorDictBase, counts: TensorDictBase | None) -> None:
        moments = 0 if self.optimizer.state else 2 * sum(p.nbytes for p in self.parameters)

        def run(size: int) -> None:
            self.backward_pass(minibatch[torch.arange(size) % len(minibatch)], rows=size, counts=counts)

        decision = self.micro_batch.choose(
            run, self.device, decisions=len(minibatch), reserve=moments, release=self.backward_pass.forget
        )
        free_memory()
        self.logger.print(decision)

    def _halve_micro_batch(self) -> None:
        size = self.micro_batch.size
        if not self.micro_batch.halve():
            raise RuntimeError(
                "The GPU's memory does not hold the forward and backward pass of one decision: use a preset for a "
                "smaller card, --recompute 1, --load-in-4bit, or a smaller --num-envs."
            )
        self.backward_pass.forget()
        free_memory()
        self.logger.print(
            f"Out of GPU memory with micro-batches of {size} decisions: from here on they have "
            f"{self.micro_batch.size}. The batch is repeated; its gradient stays the same."
        )

    def _step_if_finite(self, finite: torch.Tensor) -> None:
        if finite.item():
            self.optimizer_steps += 1
            warmup = min(1.0, self.optimizer_steps / max(1, self.config.lr_warmup_steps))
            for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
                group["lr"] = rate * warmup
            self.optimizer.step()
            self.bad_steps = 0
            return
        self.bad_steps += 1
        self.logger.print(
            f"Update {self.updates}: the loss or its gradient is not finite; this optimizer step is skipped "
            f"({self.bad_steps} in a row, the run stops at {self.config.max_bad_updates})."
        )
        if self.bad_steps >= self.config.max_bad_updates:
            raise TrainingDiverged(
                f"{self.bad_steps} optimizer steps in a row were not finite. Lower actor_lr ({self.config.actor_lr}) "
                f"or max_grad_norm ({self.config.max_grad_norm}) and resume from the last checkpoint, which is "
                "untouched; a run that has none yet is started anew."
            )

    def _rollout_metrics(self, batch: TensorDictBase, seconds: float) -> dict[str, float]:
        data = batch.reshape(-1)
        ended = data["next", "done"].reshape(-1)
        episodes = int(ended.sum())
        steps = data.get(("next", "num_control_steps"), None)
        env_steps = int(steps.sum()) if steps is not None else len(data)
        success = data.get(("next", "success"), None)
        metrics = {
            "rollout/env_steps": env_steps,
            "rollout/num_trajectories": episodes,
            "rollout/mean_length": env_steps / max(episodes, 1),
            "rollout/mean_return": float(data["next", "reward"].sum()) / max(episodes, 1),
            "time/rollout_seconds": seconds,
            "time/rollout_decisions_per_second": len(data) / seconds,
        }
        if success is not None:
            metrics["rollout/success_rate"] = float(success.reshape(-1)[ended].float().sum()) / max(episodes, 1)
        return metrics

    def _timed_validation(self) -> dict[str, float]:
        assert self._validate is not None
        started = time.perf_counter()
        figures = dict(self._validate())
        return figures | {"time/val_seconds": time.perf_counter() - started}

    def _log(self, metrics: Mapping[str, float], title: str) -> None:
        self.logger.log(metrics, update=self.updates, env_steps=self.env_steps)
        self.logger.print(format_table(metrics, title))
        self.logger.draw()


#: TorchRL's names of the loss's terms -> the names in the logs.
_FIGURES = {
    "loss_objective": "policy_loss",
    "loss_critic": "value_loss",
    "loss_entropy": "entropy_loss",
    "loss_kl": "kl_loss",
    "clip_fraction": "clipfrac",
    "kl_approx": "approx_kl",
}


def _passed(interval: int, before: int, after: int) -> bool:
    """Whether a multiple of the interval lies in (before, after]."""
    return after // interval > before // interval
