"""What a task needs besides its compiled model: indices, the robot, the state that stock's reset leaves, the goal."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["COMPARISONS", "Burner", "Predicate", "Scene"]

#: Comparisons of a joint's position with a threshold, by name.
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Predicate:
    """One condition of a goal, in indices of the compiled model.

    Args:
        kind: ``"on_object"``, ``"on_site"``, ``"in_site"`` or ``"joints"``.
        body: body of the object that is to be on or in something.
        target_body: body that it is to be on, for ``on_object``.
        site: site that it is to be on or in.
        size: half-sizes of that site in metres.
        geoms, target_geoms: contact geoms of the two bodies; empty where no contact is asked for.
        qpos: addresses of the joints, for ``joints``.
        comparison: one of ``COMPARISONS``, of a joint's position with ``threshold``.
        threshold: in metres or radians.
        every: whether all joints must pass, and not just one.
    """

    kind: str
    body: int = -1
    target_body: int = -1
    site: int = -1
    size: tuple[float, ...] = ()
    geoms: tuple[int, ...] = ()
    target_geoms: tuple[int, ...] = ()
    qpos: tuple[int, ...] = ()
    comparison: str = ""
    threshold: float = 0.0
    every: bool = False


@dataclass(frozen=True)
class Burner:
    """A site that is drawn while a stove is turned on.

    Args:
        site: index of the site.
        qpos: addresses of the knob's joints; any of them turns it on.
        threshold: position in radians from which on it does.
    """

    site: int
    qpos: tuple[int, ...]
    threshold: float


@dataclass(frozen=True)
class Scene:
    """A task's description; together with its compiled model it replaces robosuite's environment.

    Args:
        model_key: names the compiled model, which other tasks may share.
        arrays: NumPy arrays by name: the robot's (fields of ``control.Robot``), the controller's after the reset
            (fields of ``control.ArmState``), the model's ``body_pos``, ``body_quat`` and ``site_rgba`` with the
            fixtures where the reset put them, and the data's ``qacc_warmstart`` and ``ctrl``.
        eef_body: body whose orientation is observed.
        gripper_qpos: addresses of the fingers' joints.
        goal: conditions that must all hold.
        burners: sites that show whether a stove is on.
        object_bodies: bodies of the movable objects, by name.
    """

    model_key: str
    arrays: dict[str, np.ndarray]
    eef_body: int
    gripper_qpos: tuple[int, ...]
    goal: tuple[Predicate, ...]
    burners: tuple[Burner, ...]
    object_bodies: dict[str, int]

    def save(self, path: Path) -> None:
        """Write the scene as an ``.npz`` archive.

        Args:
            path: where to.
        """
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "arrays"}
        text = json.dumps(rest, default=dataclasses.asdict)
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, _rest=np.array(text), **self.arrays)

    @classmethod
    def load(cls, path: Path) -> Scene:
        """Read what ``save`` wrote.

        Args:
            path: the archive.

        Raises:
            OSError: it cannot be read.
            Exception: of many kinds, when it is not such an archive or was cut off.
        """
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name != "_rest"}
            rest: dict[str, Any] = json.loads(str(archive["_rest"]))
        rest["goal"] = tuple(Predicate(**_tuples(item)) for item in rest["goal"])
        rest["burners"] = tuple(Burner(**_tuples(item)) for item in rest["burners"])
        return cls(arrays=arrays, **_tuples(rest))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
