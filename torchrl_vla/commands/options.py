"""Options that are read before the others, because the others' defaults depend on them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

__all__ = ["read_first"]


def read_first(arguments: Sequence[str], *options: str) -> tuple[list[str | None], list[str]]:
    """Take some options out of the arguments.

    Args:
        arguments: of the command.
        options: such as ``--run-dir``; each takes a value.

    Returns:
        Their values, None for those that are not given, and the other arguments.

    Raises:
        SystemExit: an option has no value.

    Examples:
        >>> read_first(["--steps", "5", "--out=runs/a"], "--out", "--preset")
        (['runs/a', None], ['--steps', '5'])
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in options:
        parser.add_argument(option, dest=option, metavar=option.strip("-").upper())
    found, rest = parser.parse_known_args(arguments)
    return [getattr(found, option) for option in options], rest
