"""Whether a task's goal is reached, in microseconds."""

from __future__ import annotations

import mujoco
import numpy as np

from torchrl_vla.envs.simulation.scene import COMPARISONS, Predicate, Scene
from torchrl_vla.errors import UserError

__all__ = ["GoalChecker"]

#: Largest horizontal distance of two bodies' origins for one to be on the other, in metres.
_ON_OBJECT_RADIUS = 0.03
#: How far above a site's upper face an object's origin may be to be on it, and below.
_ON_SITE_HEIGHT, _ON_SITE_SLACK = 0.10, 0.005
#: How far below a site's lower face an object's origin may be to be in it.
_IN_SITE_SLACK = 0.01


class GoalChecker:
    """Evaluates a goal's conditions as LIBERO's predicates do, on any ``mjData`` of its model.

    Positions are compared before contacts, which costs less and cannot change the answer.

    Args:
        scene: the task's scene.
        num_geoms: number of geoms of its model.
    """

    def __init__(self, scene: Scene, num_geoms: int) -> None:
        self._goal = scene.goal
        self._sizes = [np.array(predicate.size) for predicate in scene.goal]
        self._contacts = [
            (_mask(predicate.geoms, num_geoms), _mask(predicate.target_geoms, num_geoms)) for predicate in scene.goal
        ]

    def __call__(self, data: mujoco.MjData) -> bool:
        """Return whether all conditions hold.

        Args:
            data: positions and contacts of the last substep.
        """
        return all(
            self._holds(data, predicate, size, contacts)
            for predicate, size, contacts in zip(self._goal, self._sizes, self._contacts, strict=True)
        )

    def in_contact(self, data: mujoco.MjData) -> list[int]:
        """Return the geoms whose contacts the conditions that hold depend on.

        Args:
            data: positions and contacts of the last substep.
        """
        conditions = zip(self._goal, self._sizes, self._contacts, strict=True)
        held = [condition[0] for condition in conditions if self._holds(data, *condition)]
        return [geom for predicate in held for geom in (*predicate.geoms, *predicate.target_geoms)]

    def _holds(
        self, data: mujoco.MjData, predicate: Predicate, size: np.ndarray, contacts: tuple[np.ndarray, np.ndarray]
    ) -> bool:
        match predicate.kind:
            case "joints":
                compare = COMPARISONS[predicate.comparison]
                passed = (compare(data.qpos[address], predicate.threshold) for address in predicate.qpos)
                return all(passed) if predicate.every else any(passed)
            case "on_object":
                position, target = data.xpos[predicate.body], data.xpos[predicate.target_body]
                return bool(
                    target[2] <= position[2]
                    and np.linalg.norm(target[:2] - position[:2]) < _ON_OBJECT_RADIUS
                    and _touch(data, *contacts)
                )
            case "on_site":
                matrix = data.site_xmat[predicate.site].reshape(3, 3)
                offset = matrix @ (data.xpos[predicate.body] - data.site_xpos[predicate.site])
                return bool(
                    size[2] - _ON_SITE_SLACK < offset[2] < size[2] + _ON_SITE_HEIGHT
                    and abs(offset[0]) < size[0]
                    and abs(offset[1]) < size[1]
                    and (not predicate.target_geoms or _touch(data, *contacts))
                )
            case "in_site":
                half = np.abs(data.site_xmat[predicate.site].reshape(3, 3) @ size)
                position, centre = data.xpos[predicate.body], data.site_xpos[predicate.site]
                low = centre - half
                low[2] -= _IN_SITE_SLACK
                return bool((position > low).all() and (position < centre + half).all())
        raise UserError(f"unknown kind of condition {predicate.kind!r}")


def _mask(geoms: tuple[int, ...], num_geoms: int) -> np.ndarray:
    mask = np.zeros(num_geoms, dtype=bool)
    mask[list(geoms)] = True
    return mask


def _touch(data: mujoco.MjData, geoms: np.ndarray, others: np.ndarray) -> bool:
    """Whether any geom of one set is in contact with any of the other."""
    first, second = data.contact.geom.T
    return bool((geoms[first] & others[second] | others[first] & geoms[second]).any())
