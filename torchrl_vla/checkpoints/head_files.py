"""The files of the heads, which upstream keeps beside the shards as ``KIND--N_checkpoint.pt``."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from torchrl_vla.checkpoints.shards import listed
from torchrl_vla.errors import UserError

__all__ = ["FOREIGN_HEADS", "HEADS", "find_heads", "head_step", "read_head", "write_head"]

HEADS = ("proprio_projector", "action_head")
"""The kinds that this package has, as it calls them too."""

FOREIGN_HEADS = {"vision_backbone": "FiLM", "noisy_action_projector": "a diffusion head"}
"""What upstream trained a checkpoint with, by the kind of the file that it left."""

_logger = logging.getLogger(__name__)


def find_heads(folder: Path) -> dict[str, Path]:
    """Find the heads' files by kind, each that of the latest step if there are several.

    Args:
        folder: a checkpoint folder.

    Raises:
        ValueError: it has a file of a part that this package does not have; without it, the policy acts otherwise.
    """
    for kind, what in FOREIGN_HEADS.items():
        for path in sorted(folder.glob(f"{kind}--*_checkpoint.pt")):
            raise UserError(
                f"{path} says that this checkpoint was trained with {what}, which this package does not have: take a "
                "checkpoint that was trained without it."
            )
    found = {}
    for kind in HEADS:
        files = sorted(
            folder.glob(f"{kind}--*_checkpoint.pt"),
            key=lambda path: int(head_step(path)) if head_step(path).isdecimal() else float("inf"),
        )
        if len(files) > 1:
            _logger.warning("%s has %d files of %s; %s is loaded.", folder, len(files), kind, files[-1].name)
        if files:
            found[kind] = files[-1]
    return found


def head_step(path: Path) -> str:
    """Tell the step of a head's file: ``150000`` of ``action_head--150000_checkpoint.pt``."""
    return path.name.partition("--")[2].removesuffix("_checkpoint.pt")


def read_head(module: nn.Module, path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a head's file by our names, mapped from the file; theirs start with ``module.``.

    Args:
        module: the head they are for, to be compared with.
        path: the file.
        device: ``cpu``, or ``meta`` to read no weights.

    Raises:
        ValueError: the file is truncated or holds anything but tensors of this head's names and shapes.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors and is not loaded: it could run code ({error}).") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} is truncated or no PyTorch file ({error}): download it again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is no state dict of tensors, so no head can be read from it.")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, shape in expected.items():
        if name not in state:
            raise UserError(f"{path} lacks {name}.")
        if tuple(state[name].shape) != shape:
            raise UserError(f"{name} is {list(state[name].shape)} in {path}, but this model makes it {list(shape)}.")
        if not state[name].is_floating_point():
            raise UserError(f"{name} in {path} is stored as {state[name].dtype}: weights are floating-point numbers.")
    if set(state) - set(expected):
        raise UserError(f"{path} has {listed(sorted(set(state) - set(expected)))}, which this head has no place for.")
    return state


def write_head(module: nn.Module, folder: Path, *, kind: str, step: str, dtype: torch.dtype) -> None:
    """Write a head's file as upstream does.

    Args:
        module: the head.
        folder: an existing folder.
        kind: one of :data:`HEADS`.
        step: the N of the file's name.
        dtype: of the weights in it.
    """
    state = {f"module.{name}": tensor.cpu().to(dtype) for name, tensor in module.state_dict().items()}
    torch.save(state, folder / f"{kind}--{step}_checkpoint.pt")
