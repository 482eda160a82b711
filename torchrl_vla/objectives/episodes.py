"""Tell whole episodes from fragments of them."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_vla.errors import UserError

__all__ = ["whole_episodes"]

_INSTEAD = (
    'Collect whole ones: GroupCollector, or TorchRL\'s Collector with trajs_per_batch=... and traj_format="cat"; or '
    "use a value estimator such as GAE (advantage_estimator=gae)."
)


def whole_episodes(tensordict: TensorDictBase, done_key: NestedKey = ("next", "done")) -> TensorDictBase:
    """Put rows of episodes one after the other, having made sure that no episode is in pieces.

    Ends are seen by ``done``. Beginnings are seen by ``is_init``, a ``step_count`` of 0, a ``num_control_steps`` of 0
    beside the observation, and a change of ``("collector", "traj_ids")``, as far as the data have them.

    Args:
        tensordict: decisions ``[T]``, or ``[..., T]`` with time last.
        done_key: bool ``[..., T, 1]``.

    Returns:
        The decisions ``[T]``.

    Raises:
        ValueError: if an episode lacks its end or its beginning.

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[False, True], [True, True]]).unsqueeze(-1)
        >>> whole_episodes(TensorDict({"next": {"done": done}}, [2, 2])).shape
        torch.Size([4])
    """
    if tensordict.ndim == 0:
        raise UserError("GRPO compares whole episodes, [T] decisions or rows [..., T] of them; this is one decision.")
    done = tensordict.get(done_key).reshape(tensordict.shape)
    if not done[..., -1:].all():
        where = (
            f"of the collector's rows {list(tensordict.shape[:-1])} some end within one"
            if tensordict.ndim > 1
            else f"the {len(tensordict)} decisions end within one"
        )
        raise UserError(f"GRPO compares whole episodes, and {where}. {_INSTEAD}")
    tensordict, done = tensordict.reshape(-1), done.reshape(-1)
    first = torch.ones_like(done)
    first[1:] = done[:-1]
    for key, begins in _beginnings(tensordict, first).items():
        wrong = (begins != first).nonzero()
        if wrong.numel():
            place = int(wrong[0])
            said = "begins" if begins[place] else "does not begin"
            before = "the batch begins" if place == 0 else "an episode ended" if first[place] else "none had ended"
            raise UserError(
                f"GRPO compares whole episodes, and by {key!r} an episode {said} at decision {place}, where {before}: "
                f"the data hold a fragment. {_INSTEAD}"
            )
    return tensordict


def _beginnings(tensordict: TensorDictBase, first: Tensor) -> dict[NestedKey, Tensor]:
    """Where episodes begin, bool ``[T]``, by each entry that says so."""
    found: dict[NestedKey, Tensor] = {}
    is_init = tensordict.get("is_init", None)
    if is_init is not None:
        found["is_init"] = is_init.reshape(-1)
    for key in ("step_count", "num_control_steps"):
        counter = tensordict.get(key, None)
        if counter is not None:
            found[key] = counter.reshape(-1) == 0
    trajectory = tensordict.get(("collector", "traj_ids"), None)
    if trajectory is not None:
        # What the first decision of the data is of, an id does not say.
        found["collector", "traj_ids"] = first.clone()
        found["collector", "traj_ids"][1:] = trajectory.reshape(-1).diff() != 0
    return found
