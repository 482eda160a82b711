"""What a task asks for, read from its BDDL definition."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torchrl_vla.errors import UserError

__all__ = ["PREDICATES", "Goal", "UnreachableGoalError", "can_reach", "read_goals"]

#: Kinds of conditions that the expert has a skill for.
PREDICATES = ("on", "in", "open", "close", "turnon", "turnoff")


class UnreachableGoalError(UserError):
    """The scripted expert cannot do what a task asks for."""


@dataclass(frozen=True)
class Goal:
    """One condition of a task's goal.

    Args:
        predicate: its name in lower case, such as ``"on"`` or ``"in"``.
        subject: what it is about: the object to move, the drawer or door to open, the stove to turn on.
        target: where that belongs: another object, or a site of the model; empty for predicates of one argument.
    """

    predicate: str
    subject: str
    target: str = ""


def read_goals(bddl_file: str | Path) -> tuple[Goal, ...]:
    """Read the conjunction of conditions that ends an episode.

    Args:
        bddl_file: the task's definition.

    Returns:
        tuple: the conditions in the order of the file.

    Raises:
        ValueError: the file states no goal.
    """
    text = Path(bddl_file).read_text(encoding="utf-8")
    _, marker, goal = text.partition("(:goal")
    goals = tuple(
        Goal(match[1].lower(), *match[2].split()) for match in re.finditer(r"\(\s*(\w+)((?:\s+\w+)+)\s*\)", goal)
    )
    if not marker or not goals:
        raise UserError(
            f"{bddl_file} states no goal: a BDDL task needs `(:goal (And (On object target)))` or the like."
        )
    return goals


def can_reach(goals: Iterable[Goal]) -> bool:
    """Whether the expert has a skill for each goal.

    The scene can still deny it, as by a handle too near to the table: ``ScriptedExpert.reset`` says so then.

    Args:
        goals: of a task.

    Examples:
        >>> can_reach([Goal("open", "drawer"), Goal("in", "bowl", "drawer")]), can_reach([Goal("up", "bowl")])
        (True, False)
    """
    return all(goal.predicate in PREDICATES for goal in goals)
