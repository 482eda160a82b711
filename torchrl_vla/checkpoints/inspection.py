"""What is in a checkpoint folder, and for which way of acting it was trained, from its headers alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from torchrl_vla.checkpoints.folder import CheckpointFolder
from torchrl_vla.checkpoints.head_files import head_step, read_head
from torchrl_vla.checkpoints.names import parameter_names, unused_shapes
from torchrl_vla.checkpoints.shards import check_tensors
from torchrl_vla.config.releases import TOKEN_CHECKPOINTS
from torchrl_vla.errors import UserError
from torchrl_vla.files import read_json
from torchrl_vla.modules.openvla.model import OpenVLA

__all__ = [
    "ActionMode",
    "CheckpointSummary",
    "TrainedMode",
    "inspect_checkpoint",
    "require_trained_tokens",
    "trained_mode",
]

ActionMode = Literal["tokens", "l1", "hybrid", "autoregressive"]

_OFT_NAME = re.compile(r"(?<![a-z])oft(?![a-z])|parallel_dec")


@dataclass(frozen=True)
class TrainedMode:
    """How a checkpoint was trained to act.

    Args:
        name: ``tokens`` (chunks of tokens, decoded in parallel), ``l1`` (regression by the L1 head), ``hybrid`` (both
            are there) or ``autoregressive`` (base OpenVLA: one token after the other).
        reason: what in the folder says so.
    """

    name: ActionMode
    reason: str

    @property
    def has_trained_tokens(self) -> bool:
        """Whether RL on tokens, decoded in parallel, can start from it."""
        return self.name in ("tokens", "hybrid")


def trained_mode(checkpoint: CheckpointFolder, *, finetuned_on_discrete_actions: bool = False) -> TrainedMode:
    """Find out for which way of acting a checkpoint was trained.

    Upstream's files do not say it. What they give away: only regression leaves an L1 head, only OpenVLA-OFT has a
    proprio projector, and the code that OpenVLA-OFT puts beside its weights knows of chunks. This package notes it in
    the ``config.json`` that it writes.

    Args:
        checkpoint: the folder.
        finetuned_on_discrete_actions: the maker of the checkpoint says that its action tokens were trained.
    """
    head = checkpoint.heads.get("action_head")
    noted = checkpoint.config.trained_for
    if noted == "tokens" or finetuned_on_discrete_actions:
        reason = (
            "config.json notes that tokens were trained last"
            if noted == "tokens"
            else "the user says that tokens were trained"
        )
        return TrainedMode("tokens" if head is None else "hybrid", reason)
    if noted == "l1":
        return TrainedMode("l1", "config.json notes that the L1 head was trained last")
    if head is not None:
        return TrainedMode("l1", f"{head.name} is there: such checkpoints are trained by regression alone")
    if "proprio_projector" in checkpoint.heads:
        return TrainedMode("tokens", "it reads the robot's state, as OpenVLA-OFT does, and has no L1 head")
    code = checkpoint.path / "modeling_prismatic.py"
    if code.is_file():
        if "ACTIONS_CHUNK" in code.read_text(encoding="utf-8", errors="replace"):
            return TrainedMode("tokens", f"{code.name} decodes chunks, as OpenVLA-OFT does, and there is no L1 head")
        return TrainedMode("autoregressive", f"{code.name} knows no chunks: it is base OpenVLA's")
    path = checkpoint.path.resolve()
    # The hub's cache has the repository's name further up.
    names = [path.name, *(parent.name for parent in path.parents if parent.name.startswith("models--"))]
    if any(_OFT_NAME.search(name.lower()) for name in names):
        return TrainedMode("tokens", "its name says OpenVLA-OFT, and there is no L1 head")
    return TrainedMode("autoregressive", "nothing of OpenVLA-OFT is in it, neither head nor projector nor code")


def require_trained_tokens(
    checkpoint: CheckpointFolder, *, finetuned_on_discrete_actions: bool = False, advice: str
) -> TrainedMode:
    """Refuse a checkpoint trained by regression alone where token probabilities are needed.

    Args:
        checkpoint: the folder.
        finetuned_on_discrete_actions: the maker of the checkpoint says that its action tokens were trained.
        advice: what else the user can do, to end the message with.

    Returns:
        What it was trained for.

    Raises:
        ValueError: the checkpoint was trained for its L1 head.
    """
    mode = trained_mode(checkpoint, finetuned_on_discrete_actions=finetuned_on_discrete_actions)
    if mode.name == "l1":
        raise UserError(
            f"{checkpoint.path} has an L1 action head ({mode.reason}): its action-token logits were never trained, so "
            f"there is no token policy in it to start from. Take a checkpoint made for tokens "
            f"({', '.join(TOKEN_CHECKPOINTS)}), or, if its maker says that the tokens were trained too, pass "
            "--finetuned-on-discrete-actions. " + advice
        )
    return mode


@dataclass(frozen=True)
class CheckpointSummary:
    """What is in a checkpoint folder.

    Args:
        checkpoint: the folder.
        mode: how it was trained to act.
        parameters: number of parameters by part; ``unused`` are those that no forward reads.
        dtypes: number of parameters of the shards by dtype.
        bytes: size of all weights on disk.
        num_tensors: tensors in the shards.
        num_shards: files that they lie in.
        steps: the step number N of each head's file, by head.
        adapter: rank, alpha and base model of ``lora_adapter/``, which upstream has merged into the shards already.
    """

    checkpoint: CheckpointFolder
    mode: TrainedMode
    parameters: dict[str, int]
    dtypes: dict[str, int]
    bytes: int
    num_tensors: int
    num_shards: int
    steps: dict[str, str]
    adapter: dict[str, object] | None


def inspect_checkpoint(
    checkpoint: CheckpointFolder, *, finetuned_on_discrete_actions: bool = False
) -> CheckpointSummary:
    """Describe a checkpoint without loading a weight.

    Args:
        checkpoint: the folder.
        finetuned_on_discrete_actions: the maker of the checkpoint says that its action tokens were trained.

    Raises:
        ValueError: a file is truncated or unsafe, or a tensor is missing, unknown or of another shape than config.json
            says.

    Examples:
        >>> import tempfile
        >>> from torchrl_vla.checkpoints.folder import open_checkpoint
        >>> from torchrl_vla.checkpoints.openvla_format import save_openvla
        >>> from torchrl_vla.modules import OpenVLAConfig
        >>> folder = tempfile.mkdtemp()
        >>> save_openvla(OpenVLA(OpenVLAConfig.tiny()), folder)
        >>> summary = inspect_checkpoint(open_checkpoint(folder))
        >>> summary.mode.name, summary.dtypes
        ('tokens', {'F32': 7987584})
    """
    with torch.device("meta"):
        model = OpenVLA(checkpoint.config, use_l1_head="action_head" in checkpoint.heads)
    own_names, unused = parameter_names(model), unused_shapes(checkpoint.config)
    expected = {name: tuple(model.get_parameter(own).shape) for name, own in own_names.items()}
    check_tensors(checkpoint.shards, expected | unused)
    parameters = Counter({"unused": sum(math.prod(shape) for shape in unused.values())})
    dtypes: Counter[str] = Counter()
    for header in checkpoint.shards.values():
        for name, info in header.items():
            dtypes[info.dtype] += math.prod(info.shape)
            if name not in unused:
                parameters[name.split(".")[0]] += math.prod(info.shape)
    for kind, path in checkpoint.heads.items():
        state = read_head(model.get_submodule(kind), path, device="meta")
        parameters[kind] = sum(tensor.numel() for tensor in state.values())
    files = [*checkpoint.shards, *checkpoint.heads.values()]
    return CheckpointSummary(
        checkpoint=checkpoint,
        mode=trained_mode(checkpoint, finetuned_on_discrete_actions=finetuned_on_discrete_actions),
        parameters=dict(parameters),
        dtypes=dict(dtypes),
        bytes=sum(path.stat().st_size for path in files),
        num_tensors=sum(len(header) for header in checkpoint.shards.values()),
        num_shards=len(checkpoint.shards),
        steps={kind: head_step(path) for kind, path in checkpoint.heads.items()},
        adapter=_read_adapter(checkpoint.path / "lora_adapter"),
    )


def _read_adapter(folder: Path) -> dict[str, object] | None:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    return {key: settings.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path")}
