"""Options that are read before the others, because the others' defaults depend on them."""

from __future__ import annotations

__all__ = ["take_option"]


def take_option(arguments: list[str], option: str) -> str | None:
    """Take the value of an option out of the arguments.

    Args:
        arguments: of the command; the option and its value are removed.
        option: such as ``--run-dir``.

    Returns:
        The value; None where the option is not given.

    Raises:
        ValueError: the option has no value.
    """
    for index, argument in enumerate(arguments):
        if argument == option:
            if index + 1 == len(arguments):
                raise ValueError(f"{option} needs a value.")
            del arguments[index]
            return arguments.pop(index)
        if argument.startswith(f"{option}="):
            return arguments.pop(index).split("=", 1)[1]
    return None
