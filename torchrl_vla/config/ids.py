"""Lists of task and state numbers on the command line, the same for every command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from torchrl_vla.errors import UserError

__all__ = ["Ids", "parse_ids"]

#: No suite has as many tasks or states; a longer range is a slip of the fingers.
_LARGEST_ID = 1_000_000


def parse_ids(words: Sequence[str]) -> list[int] | None:
    """Read numbers such as ``0 1 2``, ``0-3``, ``0..3`` or ``0-3,7``.

    Args:
        words: what the command line has; ``None`` alone stands for all.

    Raises:
        ValueError: a word is neither a number nor a range.

    Examples:
        >>> parse_ids(["0-2", "7,9"])
        [0, 1, 2, 7, 9]
    """
    if list(words) == ["None"]:
        return None
    ids: list[int] = []
    for part in (part for word in words for part in word.split(",")):
        match = re.fullmatch(r"\s*(-?\d{1,40})(?:(?:-|\.\.)(\d{1,40}))?\s*", part, flags=re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or (first != last and first < 0):
            raise UserError(f"expected numbers or ranges such as 0 1 2, 0-3 or 0-3,7, got {part!r}")
        if last > _LARGEST_ID:
            raise UserError(f"numbers go up to {_LARGEST_ID}, got {part!r}")
        ids += range(first, last + 1)
    return ids


def _is_ids(value: Any) -> bool:
    return value is None or isinstance(value, list)


def _written(ids: list[int] | None) -> list[str]:
    return ["None"] if ids is None else [str(number) for number in ids]


Ids = Annotated[
    list[int] | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT|INT-INT ...",
        instance_from_str=parse_ids,
        is_instance=_is_ids,
        str_from_instance=_written,
    ),
]
"""Numbers of tasks or states, each once; None: all."""
