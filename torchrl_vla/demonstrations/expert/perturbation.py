"""Random pushes, so that demonstrations show how to recover."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchrl_vla.errors import UserError

__all__ = ["Perturbation"]

_PUSH_STEPS = (4, 10)
_PUSH_DEVIATIONS = np.array([0.35, 0.35, 0.35, 0.12, 0.12, 0.12])


class Perturbation:
    """Turns an expert's actions into executed ones that are pushed off their way now and then.

    A push is a constant bias for 4 to 10 control steps, normal with deviations of 0.35 (translation) and 0.12
    (rotation) of a full action. The gripper's part of an action stays. The action before is the label to learn from.

    Args:
        seed: number or numbers that all randomness follows from.
        push_probability: of a push to begin at a control step without one; 0.03 gives about two in an episode.
        noise: standard deviation of what is added to every action besides, gripper left out.

    Raises:
        ValueError: the probability is not one, or the noise is negative.

    Examples:
        >>> perturb = Perturbation(seed=0, push_probability=1.0)
        >>> perturb(np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])).round(2)
        array([ 0.95,  0.22,  0.04, -0.06,  0.04,  0.16, -1.  ])
    """

    def __init__(self, seed: int | Sequence[int], *, push_probability: float = 0.03, noise: float = 0.0) -> None:
        if not 0.0 <= push_probability <= 1.0 or noise < 0.0:
            raise UserError(
                "push_probability must be between 0 and 1 and noise not negative, got "
                f"push_probability={push_probability}, noise={noise}."
            )
        self._rng = np.random.default_rng(seed)
        self._push_probability = push_probability
        self._noise = noise
        self._bias = np.zeros(6)
        self._steps_left = 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Return the action ``[7]`` to execute, within [-1, 1].

        Args:
            action: the expert's, ``[7]``.
        """
        if self._steps_left == 0 and self._rng.random() < self._push_probability:
            self._bias = self._rng.normal(0.0, _PUSH_DEVIATIONS)
            self._steps_left = int(self._rng.integers(*_PUSH_STEPS, endpoint=True))
        moved = action[:6] + self._rng.normal(0.0, self._noise, 6)
        if self._steps_left:
            self._steps_left -= 1
            moved += self._bias
        return np.concatenate([np.clip(moved, -1.0, 1.0), action[6:]])
