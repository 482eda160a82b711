"""The forward and backward pass of a micro-batch: launched kernel by kernel, or recorded once and replayed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from torchrl_vla.errors import UserError
from torchrl_vla.modules.openvla.model import OpenVLA

__all__ = ["BackwardPass", "Normalized", "RecordedPass", "can_be_recorded"]

#: A size for most mini-batches and one for the last of an epoch, for two lengths of prompts. What lies in the pool is
#: shared, but each recording keeps some ten thousand launches on the GPU.
_MOST_RECORDINGS = 4


@runtime_checkable
class Normalized(Protocol):
    """A loss that says what its means are over, and can be told the numbers of a larger batch."""

    def count_valid(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return what the loss's terms average over, without a forward."""

    def set_normalizer(self, counts: TensorDictBase | None) -> None:
        """Divide the following sums by these counts; None returns to each call's own mean."""


class BackwardPass:
    """Adds micro-batches' gradients to the parameters'.

    Args:
        loss: its terms named ``loss_*`` are summed and differentiated.
        optimizer: over the parameters.
        device: where the loss runs.
    """

    def __init__(self, loss: LossModule, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.loss = loss
        self.optimizer = optimizer
        self.device = device

    def zero_grad(self) -> None:
        """Begin a new sum of gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(
        self, micro: TensorDictBase, *, rows: int, scale: float = 1.0, counts: TensorDictBase | None = None
    ) -> dict[str, Tensor]:
        """Run one pass.

        Args:
            micro: decisions [B], on any device.
            rows: decisions of the largest micro-batch of this mini-batch.
            scale: weight of the losses.
            counts: what the mini-batch's sums are divided by, for a loss that has ``set_normalizer``.

        Returns:
            The loss's terms of one number, detached, and ``loss``, the sum of those that were differentiated, float32
            and not scaled.
        """
        return self._differentiate(micro.to(self.device), scale, counts)

    def forget(self) -> None:
        """Give back what is kept from one pass to the next."""

    def _differentiate(self, micro: TensorDictBase, scale: float, counts: TensorDictBase | None) -> dict[str, Tensor]:
        if isinstance(self.loss, Normalized):
            self.loss.set_normalizer(counts)
        terms = dict(self.loss(micro).items())
        terms["loss"] = sum(value for name, value in terms.items() if name.startswith("loss_"))
        (terms["loss"] * scale).backward()
        return {name: value.detach().float().reshape(()) for name, value in terms.items() if value.numel() == 1}


class Recorder(Protocol):
    """What :class:`~torchrl_vla.modules.openvla.graphs.GraphRecorder` does."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return what runs the function again, and its result, which is written anew each time."""

    def clear(self) -> None:
        """Forget what recordings share."""


class _Recording(NamedTuple):
    replay: Callable[[], None]
    inputs: TensorDictBase
    counts: TensorDictBase
    names: list[str]
    terms: Tensor


class RecordedPass(BackwardPass):
    """Records the pass of each shape of a micro-batch, loss and accumulation of gradients included, and replays it.

    Smaller micro-batches are filled up with decisions that are masked out, so that they share a recording. Weights,
    gradients and the loss's buffers (its coefficients) are read where they lie at each replay; numbers of Python's,
    such as the temperature or ``dual_clip``, and the share of layers that are computed again are those of the
    recording: :meth:`forget` after a change. The optimizer is no part of it.

    Args:
        loss: with masks and a normalizer.
        optimizer: over the parameters, which stay where they are.
        device: where the loss runs.
        prepare: does ahead what of the loss's forward needs the host, such as
            :meth:`~torchrl_vla.modules.backbone.OpenVLABackbone.prepare`.
        recorder: records the rest.
    """

    loss: Any  # a LossModule that is also Normalized, with keys for masks and reference log-probabilities

    def __init__(
        self,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        prepare: Callable[[TensorDictBase], TensorDictBase],
        recorder: Recorder,
    ) -> None:
        super().__init__(loss, optimizer, device)
        self._prepare = prepare
        self._recorder = recorder
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        # Recordings add to these very tensors, so that they are kept and zeroed, never replaced.
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._places: list[int] = []

    def zero_grad(self) -> None:
        """Begin a new sum of gradients."""
        if not self._gradients:
            super().zero_grad()
            return
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        torch._foreach_zero_([gradient for _, gradient in self._gradients])

    def __call__(
        self, micro: TensorDictBase, *, rows: int, scale: float = 1.0, counts: TensorDictBase | None = None
    ) -> dict[str, Tensor]:
        """Run one pass; the losses are divided by the counts alone."""
        if counts is None or scale != 1.0:
            raise UserError("a recorded pass needs the mini-batch's counts, and has no other scale.")
        inputs = self._inputs(micro, rows)
        # Recordings read the weights where they lay: after ``parameter.data = tensor`` that is another place.
        if (places := [parameter.data_ptr() for parameter in self._parameters()]) != self._places:
            self.forget()
            self._places = places
        key = frozenset((name, value.shape, value.dtype) for name, value in _tensors(inputs).items())
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs, counts)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        recording.inputs.update_(inputs)
        recording.counts.update_(counts)
        recording.replay()
        return dict(zip(recording.names, recording.terms.clone().unbind(), strict=True))

    def forget(self) -> None:
        """Give the memory of the recordings back; the next pass of each shape is recorded again."""
        self._recordings.clear()
        self._gradients.clear()
        self._recorder.clear()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _inputs(self, micro: TensorDictBase, rows: int) -> TensorDictBase:
        """Return what the loss reads, in so many rows, where it reads it."""
        keys = self.loss.tensor_keys
        valid = self.loss.valid_tokens(micro)  # read before "next", which it may come from, is left out
        micro = micro.exclude("next")
        if (decisions := len(micro)) < rows:
            # Copies of the last decision, so that there is nothing in them that a network could not compute.
            row = torch.arange(rows, device=valid.device)
            micro, valid = micro[row.clamp_max(decisions - 1)], valid[row.clamp_max(decisions - 1)]
            valid[decisions:] = False
        micro = self._prepare(micro.set(keys.mask, valid))
        if "loss_kl" in self.loss.out_keys and micro.get(keys.reference_log_prob, None) is None:
            micro.set(keys.reference_log_prob, self.loss.reference_log_prob(micro))
        return TensorDict(_tensors(micro), micro.batch_size).to(self.device, non_blocking=True)

    def _record(self, inputs: TensorDictBase, counts: TensorDictBase) -> _Recording:
        while len(self._recordings) >= _MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        inputs, counts = inputs.clone(), counts.clone()
        # Passes before the recording add nothing to the gradients: all is masked out.
        inputs.get(self.loss.tensor_keys.mask).zero_()
        names: list[str] = []

        def run() -> Tensor:
            terms = self._differentiate(inputs, 1.0, counts)
            names[:] = terms
            return torch.stack(list(terms.values()))

        replay, terms = self._recorder.record(run)
        self._gradients = [(p, p.grad) for p in self._parameters() if p.grad is not None]
        return _Recording(replay, inputs, counts, names, terms)


def _tensors(tensordict: TensorDictBase) -> dict[Hashable, Tensor]:
    leaves = tensordict.items(include_nested=True, leaves_only=True)
    return {key: value for key, value in leaves if isinstance(value, Tensor)}


def can_be_recorded(model: OpenVLA) -> bool:
    """Whether a forward and backward pass of a model never asks the host for a value.

    Flash-attention 2 does where there is padding, and so do the gradient of the embeddings and layers in 4 bits.
    """
    return (
        model.accelerated
        and model.device.type == "cuda"
        and not model.is_loaded_in_4bit
        and not model.language_model.model.embed_tokens.weight.requires_grad
        and model.language_model.config._attn_implementation == "sdpa"
    )
