"""Checks that every configuration shares: types, finite numbers, bounds."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torchrl_vla.errors import UserError

__all__ = [
    "check_fields",
    "check_ids",
    "fraction",
    "non_negative",
    "positive",
    "temperature",
    "warn_without_effect",
]

#: No option counts further than this, unless its class says so.
_LARGEST_INT = 10**9
#: The largest number that float32 holds.
_LARGEST_FLOAT = 3.4e38
_LARGEST_SEED = 2**32 - 1
#: Colder sampling is greedy but for its name.
_LEAST_TEMPERATURE = 1e-3


def check_fields(config: Any) -> None:
    """Check every field's type, and that its numbers are finite and of a sensible size.

    What Python users and JSON files write for a path or a tuple, a string and a list, is converted.

    Args:
        config: an instance of a dataclass. Its class may name in `LARGEST` the largest value of whole numbers whose
            sizes no machine has beyond it.

    Raises:
        ValueError: a field has another type than declared, is not finite, or is too large; the message names it.
    """
    largest: Mapping[str, int] = getattr(config, "LARGEST", {})
    cls: Any = type(config)
    for name, hint in _hints(cls).items():
        value = getattr(config, name)
        taken, value = _taken(value, hint)
        if not taken:
            raise UserError(f"{name} must be {_words(hint)}, got {_short(value)}.")
        setattr(config, name, value)
        for number in value if isinstance(value, list | tuple) else [value]:
            _check_number(name, number, largest.get(name, _LARGEST_INT))


def _check_number(name: str, number: Any, largest: int) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        raise UserError(f"{name} must be a finite number, got {number}.")
    if isinstance(number, float) and abs(number) > _LARGEST_FLOAT:
        raise UserError(f"{name} must be at most {_LARGEST_FLOAT:g}, what float32 holds, got {number}.")
    if not isinstance(number, int) or isinstance(number, bool):
        return
    if name in ("seed", "sampled_init_states"):
        if not 0 <= number <= _LARGEST_SEED:
            raise UserError(f"{name} must lie in 0..{_LARGEST_SEED}, got {_short(number)}.")
    elif abs(number) > largest:
        raise UserError(f"{name} must be at most {largest}, got {_short(number)}.")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _taken(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a value is of a declared type, and the value in that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            taken, converted = _taken(value, argument)
            if taken:
                return True, converted
        return False, value
    if origin is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments), value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple | range):
            return False, value
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        if fixed and len(value) != len(arguments):
            return False, value
        parts = [_taken(part, arguments[index if fixed else 0]) for index, part in enumerate(value)]
        fits = all(taken for taken, _ in parts)
        return fits, origin(part for _, part in parts) if fits else value
    if hint is Path and isinstance(value, str):
        return True, Path(value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool), value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, hint), value


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is list:
        return {int: "a list of whole numbers"}.get(arguments[0], "a list")
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return {Path: "a list of paths"}.get(arguments[0], "several whole numbers")
        return f"{len(arguments)} whole numbers"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}
    return "None" if hint is type(None) else names.get(hint, f"a {getattr(hint, '__name__', hint)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def positive(config: Any, *names: str) -> None:
    """Refuse zero and negative numbers; None and words pass, here and below.

    Args:
        config: holds the values.
        names: of its fields.

    Raises:
        ValueError: a value is not positive.
    """
    for name, value in _numbers(config, names):
        if not value > 0:
            raise UserError(f"{name} must be positive, got {value}.")


def non_negative(config: Any, *names: str) -> None:
    """Refuse negative numbers.

    Args:
        config: holds the values.
        names: of its fields.

    Raises:
        ValueError: a value is negative.
    """
    for name, value in _numbers(config, names):
        if not value >= 0:
            raise UserError(f"{name} must not be negative, got {value}.")


def fraction(config: Any, *names: str) -> None:
    """Refuse numbers outside 0 to 1.

    Args:
        config: holds the values.
        names: of its fields.

    Raises:
        ValueError: a value lies outside.
    """
    for name, value in _numbers(config, names):
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{name} must lie in [0, 1], got {value}.")


def temperature(config: Any, *names: str) -> None:
    """Refuse sampling temperatures that logits cannot be divided by; 0 is greedy and passes.

    Args:
        config: holds the values.
        names: of its fields.

    Raises:
        ValueError: a value is negative, or so small that float32 overflows.
    """
    for name, value in _numbers(config, names):
        if value != 0 and value < _LEAST_TEMPERATURE:
            raise UserError(f"{name} must be 0 (greedy) or at least {_LEAST_TEMPERATURE}, got {value}.")


def check_ids(config: Any, *names: str) -> None:
    """Refuse lists of task or state numbers that are empty, name one twice or go below 0.

    Args:
        config: holds the values; None stands for all and passes.
        names: of its fields.

    Raises:
        ValueError: a list is none of these.
    """
    for name in names:
        ids = getattr(config, name)
        if ids is None:
            continue
        if not ids:
            raise UserError(f"{name} is empty: name at least one, or leave it out.")
        if len(set(ids)) != len(ids):
            raise UserError(f"{name} has duplicates: {_short(ids)}. Name each once.")
        if min(ids) < 0:
            raise UserError(f"{name} must not be negative, got {_short(ids)}.")


def warn_without_effect(config: Any, reasons: Mapping[str, str]) -> None:
    """Warn of fields that were set and change nothing.

    Args:
        config: holds the values.
        reasons: why, by field.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, reason in reasons.items():
        value = getattr(config, name)
        if value != defaults[name]:
            warnings.warn(f"{name}={value!r} has no effect: {reason}.", stacklevel=4)


def _numbers(config: Any, names: typing.Iterable[str]) -> typing.Iterator[tuple[str, Any]]:
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, str):
            yield name, value
