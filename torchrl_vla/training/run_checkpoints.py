"""Everything a run needs to go on after an interruption, written atomically by TorchRL's checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation, GlobalRNGState

__all__ = ["RunCheckpoints", "TrainableState"]

logger = logging.getLogger(__name__)

#: In the place of a success rate: below any, since TorchRL's rotation wants a number of every checkpoint.
_UNJUDGED = -1.0


class TrainableState:
    """The parameters of a module that learn, as a state dict: adapters and heads, not the frozen 7B below them.

    Args:
        module: the policy, or any part of it.

    Examples:
        >>> linear = nn.Linear(2, 1)
        >>> linear.bias.requires_grad_(False).shape
        torch.Size([1])
        >>> list(TrainableState(linear).state_dict())
        ['weight']
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Trainable parameters by name."""
        return {name: parameter.detach() for name, parameter in self._parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy the parameters back.

        Raises:
            ValueError: the names or shapes are not this module's; nothing is changed then.
        """
        parameters = self._parameters()
        if set(parameters) != set(state):
            odd = sorted(set(parameters) ^ set(state))
            raise ValueError(
                f"The checkpoint's trainable parameters are not this policy's; {len(odd)} differ, first {odd[0]!r}. "
                "Resume with the options that the run was started with (LoRA, rank, value head)."
            )
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                raise ValueError(
                    f"{name} is {tuple(state[name].shape)} in the checkpoint, {tuple(parameter.shape)} in this policy: "
                    "resume with the options that the run was started with."
                )
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


class _RNGState(GlobalRNGState):
    """TorchRL's, also where a run goes on with another number of GPUs."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        saved, count = state_dict.get("torch_cuda", []), torch.cuda.device_count()
        if len(saved) > count:
            logger.warning(
                "The run had %d GPUs and goes on with %d: what it draws at random is not what it would have drawn.",
                len(saved),
                count,
            )
        state = {name: value for name, value in state_dict.items() if name != "torch_cuda"}
        super().load_state_dict(state | {"torch_cuda": saved[:count]} if saved[:count] else state)


class RunCheckpoints:
    """The checkpoints of one run: the newest few and the best by validated success.

    Args:
        folder: where they lie.
        keep: how many of the newest are kept; the best one is kept besides.
        components: what goes in, by name: anything with `state_dict` and `load_state_dict`. The random number
            generators' state is added.

    Examples:
        >>> import tempfile
        >>> linear = nn.Linear(2, 1)
        >>> checkpoints = RunCheckpoints(Path(tempfile.mkdtemp()), keep=1, policy=TrainableState(linear))
        >>> checkpoints.save(step=100, success=0.5).name
        'checkpoint-000000000100'
    """

    def __init__(self, folder: Path, *, keep: int, **components: Any) -> None:
        self.checkpoint = Checkpoint(rng=_RNGState(), **components)
        self.rotation = CheckpointRotation(folder, keep_last=keep, keep_best=("success", "max"))

    def save(self, *, step: int, success: float | None) -> Path:
        """Write one.

        Args:
            step: control steps collected so far; names the checkpoint.
            success: success rate of a validation of these very weights, by which the best one is kept; None if there
                was none.
        """
        metadata = {"success": _UNJUDGED if success is None else success}
        return self.rotation.save(self.checkpoint, step=step, metadata=metadata)

    def load_latest(self) -> Path:
        """Go on from the newest one.

        Raises:
            ValueError: there is none, or it does not fit what is to go on.
        """
        path = self.rotation.latest()
        if path is None:
            raise ValueError(
                f"{self.rotation.directory} holds no checkpoint to resume from: the run ended before its first one. "
                "Start it anew in another folder."
            )
        # To the CPU first, from where they are copied: the GPU that they were on may not be there, or be full.
        try:
            self.checkpoint.load(path, map_location="cpu")
        except CheckpointError as error:
            raise ValueError(
                f"{path} cannot be gone on from: {error} If options that say what learns have changed, leave them out; "
                "if the checkpoint is damaged, move it away, and the one before it is taken."
            ) from error
        return path
