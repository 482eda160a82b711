"""Supervised fine-tuning: imitate demonstrations, by action tokens or by the L1 head."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives.common import LossModule
from tqdm import tqdm

from torchrl_vla.checkpoints.policy import Policy
from torchrl_vla.config import FinetuneConfig
from torchrl_vla.datasets import DemonstrationMixture
from torchrl_vla.modules.openvla.augmentation import ImageAugmentation
from torchrl_vla.objectives.sft import ActionL1Loss, TokenCrossEntropyLoss
from torchrl_vla.training.devices import choose_device
from torchrl_vla.training.ema import ParameterAverage
from torchrl_vla.training.finetune_data import InputBuilder, load_samples, sample_buffer
from torchrl_vla.training.finetune_policy import load_student, save_student
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.optimizer_step import TrainingDiverged
from torchrl_vla.training.run_checkpoints import RunCheckpoints, TrainableState
from torchrl_vla.training.run_folder import check_run_folder, describe_run, open_run_folder
from torchrl_vla.training.run_lock import lock_run
from torchrl_vla.training.stopping import Stopped, StopRequest

__all__ = ["Finetuner", "finetune"]

_BETAS = (0.9, 0.95)


class Finetuner:
    """The loop of supervised fine-tuning.

    Args:
        config: its parameters.
        policy: what learns; its trainable parameters are chosen already.
        inputs: makes the network's inputs.
        train: training samples.
        validation: held-out samples; None: no validation.
        logger: takes the figures.
        check: called after every step; may raise :class:`~torchrl_vla.training.stopping.Stopped` to end the run.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        policy: Policy,
        inputs: InputBuilder,
        train: TensorDictReplayBuffer,
        validation: TensorDictBase | None,
        logger: RunLogger,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.model = policy.model
        self.inputs = inputs
        self.train_buffer = train
        self.validation = validation
        self.logger = logger
        self.check = check
        self.step = 0
        self.loss = self._build_loss(policy)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.actor_lr,
            betas=_BETAS,
            fused=self.model.device.type == "cuda",
        )
        self.average = ParameterAverage(self.parameters, config.ema_decay)
        self.checkpoints = RunCheckpoints(
            config.run_dir / "checkpoints",
            keep=1,
            policy=TrainableState(self.model),
            optimizer=self.optimizer,
            average=self.average,
            sampler=train.sampler,
            progress=self,
        )
        self._accuracy = 0.0

    def _build_loss(self, policy: Policy) -> LossModule:
        names = {name: name for name in self.inputs.in_keys}
        network = TensorDictModule(self.model, in_keys=names, out_keys=[("vla_action", "logits"), "hidden_states"])
        if self.config.objective == "tokens":
            centers = policy.processor.action_tokenizer
            bins = torch.arange(centers.n_bins, device=self.model.device)
            return TokenCrossEntropyLoss(
                network, target_sigma=self.config.target_sigma, bin_centers=centers.decode(bins)
            )
        head = TensorDictModule(
            self.model.action_head, in_keys=["hidden_states"], out_keys=[("vla_action", "prediction")]
        )
        return ActionL1Loss(TensorDictSequential(network, head))

    def _learning_rate(self) -> float:
        """Of the step that comes next."""
        warmup, steps = self.config.lr_warmup_steps, self.config.steps
        if self.step < warmup:
            return self.config.actor_lr * (self.step + 1) / warmup
        return self.config.actor_lr * 0.5 * (1.0 + math.cos(math.pi * (self.step - warmup) / (steps - warmup)))

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.step = int(state["step"])

    def train(self) -> dict[str, float]:
        """Run to `steps`.

        Returns:
            The last validation's figures.

        Raises:
            TrainingDiverged: the loss or its gradient is not finite.
            Stopped: the run was told to stop; a checkpoint of it is written.
        """
        config, figures = self.config, dict[str, float]()
        sums: dict[str, Tensor] = {}
        logged, started = self.step, time.perf_counter()
        first = self.step
        with tqdm(total=config.steps, initial=self.step, desc="fine-tuning", unit="step") as bar:
            while self.step < config.steps:
                _add(sums, self._optimizer_step())
                self.step += 1
                bar.update()
                if self.step == first + 1:
                    self.logger.print(f"first step (compilation included): {time.perf_counter() - started:.1f} s")
                done = self.step == config.steps
                log, save = (done or self.step % every == 0 for every in (config.log_interval, config.save_interval))
                if log or save:
                    self._check_finite(sums)
                row: dict[str, float] = {}
                if log:
                    row = {f"train/{name}": float(value) / (self.step - logged) for name, value in sums.items()}
                    row["train/learning_rate"] = self._learning_rate()
                    row["time/steps_per_second"] = (self.step - logged) / (time.perf_counter() - started)
                    sums, logged, started = {}, self.step, time.perf_counter()
                    bar.set_postfix({"loss": f"{row['train/loss']:.3f}"})
                if self.validation is not None and (done or self.step % config.val_interval == 0):
                    figures = self.validate()
                    row |= figures
                    self.logger.print(self._summary(row))
                    started = time.perf_counter()
                if row:
                    self.logger.log(row, update=self.step, env_steps=self.step)
                if save:
                    self.checkpoints.save(step=self.step, success=self._accuracy)
                if self.check is not None and not done:
                    self._stop_if_asked(sums, saved=save)
        return figures

    def _stop_if_asked(self, sums: Mapping[str, Tensor], *, saved: bool) -> None:
        assert self.check is not None
        try:
            self.check()
        except Stopped:
            if not saved:
                if sums:  # else they were looked at with this step's log
                    self._check_finite(sums)
                self.checkpoints.save(step=self.step, success=self._accuracy)
            folder = self.config.run_dir
            self.logger.print(
                f"Ended after step {self.step} of {self.config.steps}; all of it is in {folder / 'checkpoints'}. "
                f"To go on: torchrl-vla finetune --resume --run-dir {folder}"
            )
            raise

    def _optimizer_step(self) -> dict[str, Tensor]:
        """One optimizer step; its figures stay on the device."""
        self.model.train()
        batch = self.inputs(self.train_buffer.sample(), training=True)
        valid = batch["mask"].sum()
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for micro in batch.split(self.config.batch_size or self.config.mini_batch_size):
            # Each term is a mean over valid control steps; weighted by their share, micro-batches add up to the batch.
            share = micro["mask"].sum() / valid
            with self._autocast():
                terms = self.loss(micro)
            loss = sum(value for name, value in terms.items() if name.startswith("loss_")) * share
            loss.backward()
            _add(sums, {name: value.detach() * share for name, value in [*terms.items(), ("loss", loss / share)]})
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.average.update()
        return sums | {"grad_norm": norm.detach()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Judge the averaged weights on the held-out samples, as evaluation shows them.

        Returns:
            ``val/...``: the loss, and accuracy and L1 distance of the most likely (or regressed) actions.
        """
        assert self.validation is not None
        self.model.eval()
        sums: dict[str, Tensor] = {}
        total = self.validation["mask"].sum().to(self.model.device)
        # The last batch is smaller, and not worth another compilation.
        with self.average.swapped_in(), torch.compiler.set_stance("force_eager"), self._autocast():
            for samples in self.validation.split(self.config.batch_size or self.config.mini_batch_size):
                batch = self.inputs(samples, training=False)
                share = batch["mask"].sum() / total
                _add(sums, {name: value * share for name, value in self.loss(batch).items()})
        figures = {f"val/{name.removeprefix('loss_')}": float(value) for name, value in sums.items()}
        self._accuracy = figures.get("val/accuracy", 0.0)
        return figures

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.model.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")

    def _check_finite(self, sums: Mapping[str, Tensor]) -> None:
        if not math.isfinite(float(sums["loss"])) or not math.isfinite(float(sums["grad_norm"])):
            if self.checkpoints.rotation.latest() is None:
                way_on = "start over with --resume --allow-changed actor_lr: there is no checkpoint yet"
            else:
                way_on = "go on with --resume --allow-changed actor_lr: the last checkpoint is untouched"
            raise TrainingDiverged(
                f"The loss or its gradient is not finite at step {self.step}. Lower actor_lr "
                f"({self.config.actor_lr:g}) and {way_on}."
            )

    def _summary(self, row: Mapping[str, float]) -> str:
        parts = [f"{name} {value:.4g}" for name, value in row.items() if not name.startswith("time/")]
        return f"step {self.step} of {self.config.steps}: " + "   ".join(parts)


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune a policy from start (or checkpoint) to end.

    Args:
        config: the run.

    Returns:
        The finished policy's folder, for `load_policy` and upstream's tools.

    Raises:
        ValueError: something the user asked for is not available; nothing long was started then.
        Stopped: the run was told to stop; it can be resumed.
    """
    with StopRequest("the optimizer step at hand, and a checkpoint") as stop:
        return _finetune(config, stop)


def _finetune(config: FinetuneConfig, stop: StopRequest) -> Path:
    began = time.perf_counter()
    check_run_folder(config)
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    data = DemonstrationMixture(config.dataset)
    policy = load_student(config, data, device)
    stop.check()  # nothing is written yet
    train, held_out = data.split(per_task=config.episodes_per_task, held_out=config.val_episodes_per_task)
    trainable = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    tqdm.write(
        f"{sum(map(len, train.values()))} demonstrations to learn from, {sum(map(len, held_out.values()))} held out; "
        f"{trainable:,} parameters learn on {device} ({time.perf_counter() - began:.1f} s)"
    )
    started = time.perf_counter()
    samples = load_samples(data, train, policy.model, policy.processor)
    validation = load_samples(data, held_out, policy.model, policy.processor) if held_out else None
    tqdm.write(f"{len(samples):,} samples decoded, kept on {samples.device} ({time.perf_counter() - started:.1f} s)")
    inputs = InputBuilder(
        policy.model,
        policy.processor,
        data.instructions,
        augmentation=ImageAugmentation(
            config.crop_area, config.brightness, config.contrast, config.saturation, config.hue
        ),
        proprio_noise=config.proprio_noise,
    )
    if config.compile or (config.compile is None and device.type == "cuda"):
        policy.model.compile(dynamic=False)
    buffer = sample_buffer(samples, config.mini_batch_size)
    stop.check()
    with lock_run(open_run_folder(config)), closing(RunLogger(config.run_dir)) as logger:
        trainer = Finetuner(config, policy, inputs, buffer, validation, logger, stop.check)
        if config.resume:
            trainer.checkpoints.load_latest()
            logger.restore(trainer.step)
            tqdm.write(f"resumed after step {trainer.step}")
        describe_run(
            config, config.run_dir
        )  # only now: options that the checkpoint does not fit are none to resume with
        started = time.perf_counter()
        trainer.train()
        tqdm.write(f"training took {time.perf_counter() - started:.1f} s")
        folder = config.run_dir / "policy"
        with trainer.average.swapped_in():
            size = save_student(policy, folder, data.statistics)
    tqdm.write(
        f"Done in {time.perf_counter() - began:.1f} s. Policy: {folder} ({size / 2**20:.1f} MiB)   "
        f"Figures: {logger.csv_path}"
    )
    return folder
