"""One optimizer step: its gradient accumulated over micro-batches, checked, clipped, applied at the scheduled rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torchrl.objectives import LossModule

from torchrl_vla.config import PPOConfig
from torchrl_vla.distributed.ranks import ALONE, OneProcess
from torchrl_vla.modules.openvla.graphs import GraphRecorder
from torchrl_vla.objectives.combining import average, combine
from torchrl_vla.training.backward_pass import BackwardPass, Normalized, RecordedPass
from torchrl_vla.training.micro_batch import MicroBatch, free_memory
from torchrl_vla.training.schedule import LearningRateSchedule

__all__ = ["OptimizerStep", "TrainingDiverged"]


class TrainingDiverged(RuntimeError):
    """Too many optimizer steps in a row had a loss or gradient that is not finite."""


class OptimizerStep:
    """Steps an optimizer on mini-batches of any size, in the memory there is.

    The loss is any TorchRL ``LossModule``. One with ``count_valid`` and ``set_normalizer``
    (:class:`~torchrl_vla.training.backward_pass.Normalized`) says what its means are over, so that micro-batches add up
    to exactly their mini-batch's loss; any other is averaged over micro-batches by their numbers of decisions.

    Args:
        loss: its terms named ``loss_*`` are summed and differentiated.
        optimizer: over the loss's trainable parameters.
        config: sizes of micro-batches, the bound on the gradient's norm, when to give up.

    Keyword Args:
        schedule: a learning-rate scheduler, stepped once after each optimizer step; None: the rates stay as they are.
        device: where the loss runs.
        report: called with a sentence when something happens that the user should know.
        set_recompute: tells the policy which share of its layers to compute again in the backward pass; None if it
            cannot.
        prepare: for a policy whose passes can be recorded and replayed on a GPU: does ahead what of them needs the
            host; None launches them as any loss's.
        check: called after every step; may raise to end the update there.
        ranks: the processes that step together, each on its own decisions of a mini-batch, which can be none. Weights
            stay the same in all.

    Examples:
        >>> for minibatch in buffer:  # doctest: +SKIP
        ...     figures = step(minibatch)
    """

    def __init__(
        self,
        loss: LossModule,
        optimizer: torch.optim.Optimizer,
        config: PPOConfig,
        *,
        schedule: LRScheduler | None = None,
        device: torch.device | str = "cpu",
        report: Callable[[str], None] = print,
        set_recompute: Callable[[float], None] | None = None,
        prepare: Callable[[TensorDictBase], TensorDictBase] | None = None,
        check: Callable[[], None] | None = None,
        ranks: OneProcess = ALONE,
    ) -> None:
        self.loss = loss
        self.optimizer = optimizer
        self.config = config
        self.schedule = schedule
        self.device = torch.device(device)
        self.report = report
        self._check = check
        self._ranks = ranks
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.micro_batch = MicroBatch(
            config.batch_size, config.gradient_checkpointing, memory_gb=config.memory_gb, set_recompute=set_recompute
        )
        self.backward_pass = BackwardPass(loss, optimizer, self.device)
        if prepare is not None and isinstance(loss, Normalized):
            self.backward_pass = RecordedPass(loss, optimizer, self.device, prepare, GraphRecorder())
        self.optimizer_steps = 0
        self.bad_steps = 0

    def state_dict(self) -> dict[str, int]:
        """How many steps were taken, and how many in a row were skipped."""
        return {"optimizer_steps": self.optimizer_steps, "bad_steps": self.bad_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.optimizer_steps, self.bad_steps = int(state["optimizer_steps"]), int(state["bad_steps"])

    def set_progress(self, progress: float) -> None:
        """Tell the schedule, if it asks for it, which share of the run is over."""
        if isinstance(self.schedule, LearningRateSchedule):
            self.schedule.set_progress(progress)

    def __call__(self, minibatch: TensorDictBase, progress: Callable[[int], object] | None = None) -> dict[str, Tensor]:
        """Take one step.

        Args:
            minibatch: this process's decisions ``[B]``, with what the loss reads.
            progress: called with the number of decisions done, negative where they will be repeated.

        Returns:
            The loss's scalar terms and ``grad_norm``, float32, on the device.

        Raises:
            TrainingDiverged: the last `max_bad_updates` steps had a loss or gradient that is not finite.
            RuntimeError: memory does not hold the pass of one decision.
        """
        progress = progress or (lambda decisions: None)
        counts, total = None, self._ranks.sum(len(minibatch))
        if isinstance(self.loss, Normalized):
            counts = self.loss.count_valid(minibatch).to(self.device)
            self._ranks.sum_(list(counts.values()))
        if not self.micro_batch.chosen and len(minibatch):
            self._choose_micro_batch(minibatch, counts)
        while (parts := self._accumulate(minibatch, progress, counts, total)) is None:
            self._halve_micro_batch()
        self._ranks.sum_gradients(self.parameters)
        sums = self._put_together(parts, counts)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self._step_if_finite(torch.isfinite(norm) & torch.isfinite(sums["loss"]))
        if self._check is not None:
            self._check()
        return sums | {"grad_norm": norm.detach().float()}

    def _accumulate(
        self, minibatch: TensorDictBase, progress: Callable[[int], object], counts: TensorDictBase | None, total: int
    ) -> list[tuple[float, dict[str, Tensor]]] | None:
        """Return the gradient of these decisions, and each pass's weight and figures; None if memory runs out."""
        self.backward_pass.zero_grad()
        parts: list[tuple[float, dict[str, Tensor]]] = []
        if not len(minibatch):
            return parts
        rows, done = self.micro_batch.rows(len(minibatch), self.config.traj_split_num), 0
        try:
            for micro in minibatch.split(rows):
                # With counts the loss divides by the mini-batch's itself; a stock loss is a mean over the micro-batch.
                share = len(micro) / total if counts is None else 1.0
                parts.append((share, self.backward_pass(micro, rows=rows, scale=share, counts=counts)))
                done += len(micro)
                progress(len(micro))
        except torch.OutOfMemoryError:
            progress(-done)
            return None
        return parts

    def _put_together(
        self, parts: list[tuple[float, dict[str, Tensor]]], counts: TensorDictBase | None
    ) -> dict[str, Tensor]:
        """Return the figures of a mini-batch from those of all processes' passes."""
        if self._ranks.size > 1:
            sent = [(share, {name: value.cpu() for name, value in part.items()}) for share, part in parts]
            parts = [part for ranks in self._ranks.gather(sent) for part in ranks]
        return average(parts) if counts is None else combine([part for _, part in parts])

    def _choose_micro_batch(self, minibatch: TensorDictBase, counts: TensorDictBase | None) -> None:
        moments = 0 if self.optimizer.state else 2 * sum(p.nbytes for p in self.parameters)

        def run(size: int) -> None:
            self.backward_pass(minibatch[torch.arange(size) % len(minibatch)], rows=size, counts=counts)

        decision = self.micro_batch.choose(
            run, self.device, decisions=len(minibatch), reserve=moments, release=self.backward_pass.forget
        )
        free_memory()
        self.report(decision)

    def _halve_micro_batch(self) -> None:
        size = self.micro_batch.size
        if not self.micro_batch.halve():
            raise RuntimeError(
                "The GPU's memory does not hold the forward and backward pass of one decision: use a preset for a "
                "smaller card, --gradient-checkpointing 1, --load-in-4bit, or a smaller --num-envs."
            )
        self.backward_pass.forget()
        free_memory()
        self.report(
            f"Out of GPU memory with micro-batches of {size} decisions: from here on they have "
            f"{self.micro_batch.size}. The batch is repeated; its gradient stays the same."
        )

    def _step_if_finite(self, finite: Tensor) -> None:
        if finite.item():
            self.optimizer.step()
            self.optimizer_steps += 1
            self.bad_steps = 0
            if self.schedule is not None:
                self.schedule.step()
            return
        self.bad_steps += 1
        self.report(
            f"The loss or its gradient is not finite; this optimizer step is skipped ({self.bad_steps} in a row, the "
            f"run stops at {self.config.max_bad_updates})."
        )
        if self.bad_steps >= self.config.max_bad_updates:
            raise TrainingDiverged(
                f"{self.bad_steps} optimizer steps in a row were not finite. Lower actor_lr ({self.config.actor_lr}) "
                f"or max_grad_norm ({self.config.max_grad_norm}) and resume from the last checkpoint, which is "
                "untouched."
            )
