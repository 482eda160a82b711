"""OpenVLA's action tokens: 256 bins at the end of the language model's vocabulary, and the units of an action."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrl_vla.errors import UserError

__all__ = ["ActionTokenizer"]

_IDENTITY: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]},
    "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
}


class ActionTokenizer(nn.Module):
    """Translates between token bins, normalised actions and the actions an environment takes.

    A *bin* is an index in token-id order: bin ``b`` is token ``vocab_size - n_bins + b``. Ids run from high to low
    action, since a token's id is ``vocab_size - digitize(action)``. There are ``n_bins`` edges and ``n_bins - 1``
    centres, so the two highest-action bins, 0 and 1, decode alike. Same convention as
    :class:`torchrl.data.vla.VocabTailActionTokenizer`, with float64 edges and centres, as upstream's NumPy has them.

    Three units of an action ``[..., 7]`` occur: *normalised* (what tokens encode, in [-1, 1]), *dataset* (as recorded
    for training; gripper 0 closed, 1 open) and *env* (what LIBERO steps with; gripper -1 open, +1 close).

    Args:
        statistics: 1st and 99th percentiles of the training data, ``{"action": {"q01": [7], "q99": [7],
            "mask": [7]}, "proprio": {"q01": [8], "q99": [8]}}``. Dimensions out of the mask are not normalised; a
            missing mask takes all in; ``"proprio"`` may be missing. ``None``: q01 = -1, q99 = 1, gripper not masked in.
        n_bins: number of bins per action dimension.
        vocab_size: size of the language model's vocabulary, action tokens included, paddings excluded.

    Raises:
        ValueError: if a size is too small, or percentiles are missing, not finite, swapped or of unequal length.

    Source: OpenVLA (arXiv:2406.09246, section 3.2) and OpenVLA-OFT (arXiv:2502.19645).

    Examples:
        >>> import torch
        >>> tokenizer = ActionTokenizer()
        >>> bins = tokenizer.encode(torch.tensor([-1.0, 0.0, 1.0]))
        >>> bins
        tensor([255, 128,   0])
        >>> tokenizer.bins_to_ids(bins)
        tensor([31999, 31872, 31744])
        >>> tokenizer.decode(bins)
        tensor([-0.9961,  0.0000,  0.9961])
    """

    action_q01: Tensor
    action_q99: Tensor
    action_mask: Tensor
    proprio_q01: Tensor | None
    proprio_q99: Tensor | None
    bin_edges: Tensor
    bin_centers: Tensor

    def __init__(
        self,
        statistics: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
        *,
        n_bins: int = 256,
        vocab_size: int = 32000,
    ) -> None:
        super().__init__()
        if n_bins < 2:
            raise UserError(f"n_bins must be at least 2, got {n_bins}.")
        if vocab_size < n_bins:
            raise UserError(f"vocab_size must be at least n_bins ({n_bins}), got {vocab_size}.")
        self.n_bins = n_bins
        self.vocab_size = vocab_size
        edges = np.linspace(-1.0, 1.0, n_bins)
        self.register_buffer("bin_edges", torch.from_numpy(edges), persistent=False)
        self.register_buffer("bin_centers", torch.from_numpy((edges[:-1] + edges[1:]) / 2.0), persistent=False)

        statistics = _IDENTITY if statistics is None else statistics
        if not isinstance(statistics, Mapping) or "action" not in statistics:
            got = sorted(statistics) if isinstance(statistics, Mapping) else repr(statistics)
            raise UserError(f"statistics must have the entry 'action', got {got}.")
        q01, q99 = _percentiles("action", statistics["action"])
        given = statistics["action"].get("mask", [True] * len(q01))
        if not isinstance(given, Sequence) or any(value not in (True, False) for value in given):
            raise UserError(f"statistics['action']['mask'] must be a list of true and false, got {given!r}.")
        mask = torch.tensor(list(given), dtype=torch.bool)
        if mask.shape != q01.shape:
            raise UserError(f"statistics['action']['mask'] has {mask.numel()} entries, 'q01' has {q01.numel()}.")
        self.register_buffer("action_q01", q01)
        self.register_buffer("action_q99", q99)
        self.register_buffer("action_mask", mask)
        proprio = _percentiles("proprio", statistics["proprio"]) if "proprio" in statistics else (None, None)
        self.register_buffer("proprio_q01", proprio[0])
        self.register_buffer("proprio_q99", proprio[1])

    def statistics(self) -> dict[str, dict[str, list[Any]]]:
        """Return the percentiles in upstream's format, to the bit those the tokenizer was made with."""
        out = {
            "action": {
                "q01": self.action_q01.tolist(),
                "q99": self.action_q99.tolist(),
                "mask": self.action_mask.tolist(),
            }
        }
        if self.proprio_q01 is not None and self.proprio_q99 is not None:
            out["proprio"] = {"q01": self.proprio_q01.tolist(), "q99": self.proprio_q99.tolist()}
        return out

    def encode(self, actions: Tensor) -> Tensor:
        """Normalised actions ``[..., D]`` to bins int64 ``[..., D]``; values outside [-1, 1] are clipped.

        Raises:
            ValueError: if an action is NaN.
        """
        if actions.isnan().any():
            raise UserError("actions to encode contain NaN; every entry must be a number, best within [-1, 1].")
        clipped = actions.to(torch.float64).clamp(-1.0, 1.0)
        # right=True is np.digitize: the first edge strictly above the value, 1..n_bins.
        return self.n_bins - torch.bucketize(clipped, self.bin_edges, right=True)

    def decode(self, bins: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Bins int64 ``[..., D]`` to the normalised centres ``[..., D]`` in ``dtype`` (float64: upstream's own)."""
        index = (self.n_bins - bins - 1).clamp(0, self.n_bins - 2)
        return self.bin_centers[index].to(dtype)

    def bins_to_ids(self, bins: Tensor) -> Tensor:
        """Bins int64 to ids of the language model's vocabulary (31744..31999 for Llama's)."""
        return bins + (self.vocab_size - self.n_bins)

    def ids_to_bins(self, ids: Tensor) -> Tensor:
        """Vocabulary ids int64 to bins; an id that is no action token becomes the nearest one, as upstream clips."""
        return (ids - (self.vocab_size - self.n_bins)).clamp(0, self.n_bins - 1)

    def normalize(self, actions: Tensor) -> Tensor:
        """Dataset actions ``[..., 7]`` to normalised ones, clipped to [-1, 1] where the mask is set."""
        scaled = _to_unit_range(actions, self.action_q01, self.action_q99)
        return torch.where(self.action_mask, scaled, actions.to(torch.float64)).to(actions.dtype)

    def unnormalize(self, actions: Tensor) -> Tensor:
        """Normalised actions ``[..., 7]`` to dataset units: ``(a + 1) / 2 * (q99 - q01 + 1e-8) + q01``."""
        wide = actions.to(torch.float64)
        scaled = 0.5 * (wide + 1.0) * (self.action_q99 - self.action_q01 + 1e-8) + self.action_q01
        return torch.where(self.action_mask, scaled, wide).to(actions.dtype)

    def normalize_proprio(self, state: Tensor) -> Tensor:
        """Proprioception ``[..., 8]`` to [-1, 1]: ``clip(2 * (s - q01) / (q99 - q01 + 1e-8) - 1)``.

        Raises:
            ValueError: if the statistics have no ``"proprio"``, or the last dimension is another.
        """
        if self.proprio_q01 is None or self.proprio_q99 is None:
            raise UserError(
                "The statistics have no entry 'proprio', so a proprioceptive state cannot be normalised; use the "
                "dataset_statistics.json of a checkpoint trained with proprioception, or a model without it."
            )
        if state.shape[-1] != self.proprio_q01.numel():
            raise UserError(f"state must be [..., {self.proprio_q01.numel()}], got {list(state.shape)}.")
        return _to_unit_range(state, self.proprio_q01, self.proprio_q99).to(state.dtype)

    def to_env(self, actions: Tensor) -> Tensor:
        """Normalised actions ``[..., 7]`` to env actions float32 in [-1, 1].

        The gripper ``g`` becomes ``-sign(2 g - 1)``. The rest is clipped to [-1, 1], as LIBERO's controller does.
        """
        wide = self.unnormalize(actions.to(torch.float64))
        gripper = -torch.sign(2.0 * wide[..., -1:] - 1.0)
        return torch.cat([wide[..., :-1].clamp(-1.0, 1.0), gripper], dim=-1).to(torch.float32)

    def from_env(self, actions: Tensor) -> Tensor:
        """Env actions ``[..., 7]`` to normalised ones, the inverse of :meth:`to_env` up to its clipping."""
        gripper = 0.5 * (1.0 - actions[..., -1:].clamp(-1.0, 1.0))
        return self.normalize(torch.cat([actions[..., :-1], gripper], dim=-1))

    def bins_to_env(self, bins: Tensor) -> Tensor:
        """Bins int64 ``[..., 7]`` to env actions float32, in float64 throughout and rounded once."""
        return self.to_env(self.decode(bins, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActionTokenizer:
        # A policy cast to bf16 takes its tokenizer along; rounded percentiles would be other actions.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def _to_unit_range(values: Tensor, q01: Tensor, q99: Tensor) -> Tensor:
    return (2.0 * (values.to(torch.float64) - q01) / (q99 - q01 + 1e-8) - 1.0).clamp(-1.0, 1.0)


def _percentiles(name: str, entry: Mapping[str, Sequence[Any]]) -> tuple[Tensor, Tensor]:
    for field in ("q01", "q99"):
        if not isinstance(entry, Mapping) or field not in entry:
            got = sorted(entry) if isinstance(entry, Mapping) else repr(entry)
            raise UserError(f"statistics[{name!r}] must have 'q01' and 'q99', got {got}.")
    try:
        q01 = torch.as_tensor(entry["q01"], dtype=torch.float64)
        q99 = torch.as_tensor(entry["q99"], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"statistics[{name!r}]: 'q01' and 'q99' must be lists of numbers ({error}).") from error
    if q01.ndim != 1 or q01.shape != q99.shape:
        raise UserError(
            f"statistics[{name!r}]: 'q01' and 'q99' must be lists of one length, got {list(q01.shape)} "
            f"and {list(q99.shape)}."
        )
    for index, (low, high) in enumerate(zip(q01.tolist(), q99.tolist(), strict=True)):
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise UserError(
                f"statistics[{name!r}]: 'q01' and 'q99' of dimension {index} are {low} and {high}; both must be "
                "finite, and 'q01' not above 'q99'."
            )
    return q01, q99
