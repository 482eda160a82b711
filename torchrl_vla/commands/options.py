"""Which options a command line gives, as its parser tells; others keep a preset's or a resumed run's values."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, TypedDict

import tyro

__all__ = ["given_options"]


def given_options(config: type, arguments: Sequence[str], *, prog: str) -> dict[str, Any]:
    """Parse the options that are given, however they are spelled, and nothing else.

    Args:
        config: the command's dataclass, with dataclasses as fields perhaps; the command line is flat.
        arguments: of the command. What is no option is left to the parse that follows.
        prog: name of the command, for the parser's messages.

    Returns:
        Value by field name; no field that is not given.

    Raises:
        SystemExit: a value is not of its option's type; the parser has said so.

    Examples:
        >>> from torchrl_vla.config import TrainConfig
        >>> given_options(TrainConfig, ["--run_dir=runs/a", "--timesteps", "5"], prog="train")
        {'total_timesteps': 5, 'run_dir': PosixPath('runs/a')}
    """
    # Keys of such a dictionary have no defaults: what is not given is not in it.
    given = TypedDict("given", _flat_hints(config), total=False)  # type: ignore[misc]
    found, _ = tyro.cli(given, args=arguments, prog=prog, add_help=False, return_unknown_args=True)
    return dict(found)


def _flat_hints(config: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(config, include_extras=True)
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        flat |= _flat_hints(hint) if dataclasses.is_dataclass(hint) else {field.name: hint}
    return flat
