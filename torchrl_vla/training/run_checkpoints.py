"""Everything a run needs to go on after an interruption, written atomically by TorchRL's checkpoints."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation, GlobalRNGState
from tqdm import tqdm

from torchrl_vla.checkpoints.integrity import CHECKSUMS, find_damage, flush_to_disk, write_checksums
from torchrl_vla.errors import UserError
from torchrl_vla.training.progress import RunProgress

__all__ = ["RunCheckpoints", "TrainableState", "newest_whole"]

logger = logging.getLogger(__name__)

#: In the place of a success rate: below any, since TorchRL's rotation wants a number of every checkpoint.
_UNJUDGED = -1.0
#: Version of what a checkpoint holds.
_FORMAT = 2
_PARTIAL = ".partial-checkpoint-"
#: Bytes for the small files of a checkpoint.
_SLACK = 1 << 20


class TrainableState:
    """The parameters of a module that learn, as a state dict: adapters and heads, not the frozen 7B below them.

    Args:
        module: the policy, or any part of it; None for a part that this run does not have.

    Examples:
        >>> linear = nn.Linear(2, 1)
        >>> linear.bias.requires_grad_(False).shape
        torch.Size([1])
        >>> list(TrainableState(linear).state_dict())
        ['weight']
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module

    def _parameters(self) -> dict[str, nn.Parameter]:
        parameters = () if self.module is None else self.module.named_parameters()
        return {name: parameter for name, parameter in parameters if parameter.requires_grad}

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
            raise UserError(
                f"The checkpoint's trainable parameters are not this policy's; {len(odd)} differ, first {odd[0]!r}. "
                "Resume with the options that the run was started with (LoRA, rank, value head)."
            )
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                raise UserError(
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
    """The checkpoints of one run: the newest few and the best by validated success, each with checksums.

    A checkpoint is written beside the others, its files' checksums noted, flushed to the disk, and only then put in
    its place. Damage is found before anything is read, and the newest whole one is taken.

    Args:
        folder: where they lie.
        keep: how many of the newest are kept; the best one is kept besides.
        writes: False in a process that leaves the writing to another one, which has the same components.
        after_save: called after each one, such as for what is written beside them.
        components: what goes in, by name: anything with `state_dict` and `load_state_dict`. The random number
            generators' state is added.

    Examples:
        >>> import tempfile
        >>> linear = nn.Linear(2, 1)
        >>> checkpoints = RunCheckpoints(Path(tempfile.mkdtemp()), keep=1, policy=TrainableState(linear))
        >>> checkpoints.save(step=100, success=0.5).name
        'checkpoint-000000000100'
        >>> checkpoints.load_latest().name
        'checkpoint-000000000100'
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        writes: bool = True,
        after_save: Callable[[], None] | None = None,
        **components: Any,
    ) -> None:
        self._writes = writes
        self._after_save = after_save
        self._marked: dict[str, Any] = {}
        self._components = {**components, "rng": _RNGState()}
        self.checkpoint = Checkpoint(**{name: _Marked(self, name) for name in self._components})
        self.rotation = CheckpointRotation(folder, keep_last=keep, keep_best=("success", "max"))
        self.folder = folder

    @contextmanager
    def rollout(self, *names: str) -> Iterator[None]:
        """Collect a batch: if that is interrupted, what is saved next is the state that the rollout began with.

        A rollout that was cut short is run again from its start; the policy does not change while it runs.

        Args:
            names: of the components that collecting changes; the random numbers' are always among them.
        """
        self._marked = {name: copy.deepcopy(self._components[name].state_dict()) for name in (*names, "rng")}
        yield
        self._marked = {}

    @contextmanager
    def kept_at_the_end(self, progress: RunProgress, report: Callable[[str], None]) -> Iterator[None]:
        """Write one more when the work is told to stop, or a rollout in it fails, and say how to go on.

        Args:
            progress: how far the run has come.
            report: takes the sentence.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, SystemExit) or self._marked:
                path = self._path(progress.env_steps)
                if not path.exists():  # else nothing has changed since
                    self.save(step=progress.env_steps, success=None)
                report(
                    f"Ended after {progress}; all of it is in {path}. "
                    f"To go on: torchrl-vla train --resume --run-dir {self.folder.parent}"
                )
            raise

    def save(self, *, step: int, success: float | None) -> Path:
        """Write one.

        Args:
            step: control steps collected so far; names the checkpoint.
            success: success rate of a validation of these very weights, by which the best one is kept; None if there
                was none.

        Raises:
            UserError: there is no room for it; nothing was written, and those before it are whole.
        """
        metadata = {"format": _FORMAT, "success": _UNJUDGED if success is None else success}
        path, partial = self._path(step), self.folder / f"{_PARTIAL}{step:012d}"
        if not self._writes:
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        self._require_space()
        self.checkpoint.save(partial, metadata=metadata)
        write_checksums(partial)
        if path.exists():  # saved again after an interruption: the old one goes when the new one is whole
            shutil.rmtree(path)
        partial.rename(path)
        flush_to_disk(self.folder)
        self.rotation.prune()
        if self._after_save is not None:
            self._after_save()
        return path

    def load_latest(self) -> Path | None:
        """Go on from the newest whole one, and say which were passed over; None if there is none at all.

        Raises:
            ValueError: all are damaged, or it does not fit what is to go on. No file is touched.
        """
        path = newest_whole(self.folder)
        if path is None:
            return None
        # To the CPU first, from where they are copied: the GPU that they were on may not be there, or be full.
        try:
            self.checkpoint.load(path, map_location="cpu")
        except CheckpointError as error:
            raise UserError(
                f"{path} cannot be resumed from: {error} If options that say what learns have changed, leave them out."
            ) from error
        return path

    def _require_space(self) -> None:
        """Look for room first: what is written is mapped into memory, where a full disk would end the process."""
        states = (component.state_dict() for component in self._components.values())
        needed = int(1.05 * sum(_count_bytes(state) for state in states)) + _SLACK
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder} has room for {free / 1e6:,.0f} MB, and a checkpoint needs {needed / 1e6:,.0f} MB. The "
                "checkpoints in it are whole: make room, then go on with --resume."
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:012d}"

    def _sweep(self) -> None:
        """Remove what a process that was killed left half written."""
        for leftover in (*self.folder.glob(f"{_PARTIAL}*"), *self.folder.glob(".*.stage-*")):
            shutil.rmtree(leftover, ignore_errors=True)


def _count_bytes(state: Any) -> int:
    """Bytes of the tensors in a state, however nested."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(map(_count_bytes, values))


class _Marked:
    """A component of :class:`RunCheckpoints`, whose state is the marked one while there is one."""

    def __init__(self, checkpoints: RunCheckpoints, name: str) -> None:
        self._checkpoints, self._name = checkpoints, name

    def state_dict(self) -> Any:
        marked = self._checkpoints._marked
        return marked[self._name] if self._name in marked else self._checkpoints._components[self._name].state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._checkpoints._components[self._name].load_state_dict(state)


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that is as it was written; those passed over are named on the console.

    Args:
        folder: the run's checkpoints.

    Returns:
        Its path; None if there is no checkpoint, whole or not.

    Raises:
        ValueError: all are damaged.
    """
    damaged: dict[Path, list[str]] = {}
    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        damage = find_damage(path)
        if not damage:
            for other, reasons in damaged.items():
                tqdm.write(f"{other} is damaged and passed over: {'; '.join(reasons[:3])}.")
            return path
        damaged[path] = damage
    if damaged and all(reasons == [f"{CHECKSUMS} is missing"] for reasons in damaged.values()):
        raise UserError(
            f"{folder} was written by torchrl-vla 0.1.0, whose checkpoints have no checksums and cannot be resumed by "
            "this version. Start a new run from its policy: --pretrained-checkpoint RUN/policy."
        )
    if damaged:
        listed = "; ".join(f"{path.name}: {reasons[0]}" for path, reasons in damaged.items())
        raise UserError(
            f"All checkpoints in {folder} are damaged ({listed}). Nothing was changed: restore one from a copy, or "
            "start a new run from the run's policy folder."
        )
    return None
