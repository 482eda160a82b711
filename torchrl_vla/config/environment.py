"""Which tasks a command runs, from which initial states, and how the robot is seen and driven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torchrl_vla.config.ids import Ids
from torchrl_vla.config.validation import check_fields, check_ids, non_negative, positive
from torchrl_vla.errors import UserError

__all__ = ["EnvironmentConfig"]


@dataclass
class EnvironmentConfig:
    """LIBERO: which tasks, from which initial states, how the robot is seen and driven.

    Raises:
        ValueError: a value is out of range. Suite and task names are checked when the suite is opened.

    Examples:
        >>> EnvironmentConfig(task_ids=[0, 1, 2, 3], num_envs=4).tasks
        [0, 1, 2, 3]
    """

    LARGEST: ClassVar[Mapping[str, int]] = {
        "num_envs": 4096,
        "camera_size": 4096,
        "max_episode_steps": 1_000_000,
        "settle_steps": 1_000_000,
    }

    task_suite: str = "libero_spatial"
    """LIBERO suite (libero_spatial, libero_object, libero_goal, libero_10, libero_90) or one of LIBERO-PRO's."""
    task_ids: Ids = None
    """Tasks to train on, such as 0 1 2 3 or 0-3; None: task_id alone."""
    task_id: int = 0
    """The task, if task_ids is not given."""
    num_envs: int = 1
    """Simulators run side by side; need not equal the number of tasks."""
    obs_mode: Literal["image_state"] = "image_state"
    """Camera images and robot state: what a VLA reads, and the only mode."""
    image_size: tuple[int, int] | None = None
    """Height and width of the policy's input image; None: what the checkpoint was made for, which is (224, 224) for
    OpenVLA 7B. A value that is given must be the checkpoint's."""
    camera_size: int = 256
    """Height and width of the rendered camera images, in pixels."""
    max_episode_steps: int | None = None
    """Horizon in control steps; None: the suite's own (220 / 280 / 300 / 520 / 400)."""
    settle_steps: int = 10
    """Control steps waited after an initial state is set, as in the evaluation protocol."""
    init_state_ids: Ids = None
    """Initial states to train from, such as 0 1 2 or 0-39; None: all of the task's."""
    val_init_state_ids: Ids = None
    """Initial states to validate from; None: all of the task's, in order."""
    proprio_format: Literal["axis_angle", "quaternion"] = "axis_angle"
    """axis_angle: position 3 + axis-angle 3 + gripper 2, what released OFT checkpoints were trained on; quaternion:
    position 3 + quaternion w, x, y, z + gripper 1."""
    reward_scale: float = 1.0
    """Reward of a success."""
    fidelity: Literal["exact", "fast"] = "exact"
    """exact: stock LIBERO's bits; fast: cheaper physics and images (no anti-aliasing, mirrors or details of 2 mm).
    Judge policies with exact."""
    worker_timeout: float = 120.0
    """Seconds after which a simulating process that does not answer is replaced and its episodes run again; five times
    as long while it starts and resets."""

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self, "num_envs", "camera_size", "reward_scale", "worker_timeout", "max_episode_steps")
        non_negative(self, "task_id", "settle_steps")
        check_ids(self, "task_ids", "init_state_ids", "val_init_state_ids")
        if self.image_size is not None and (min(self.image_size) <= 0 or self.image_size[0] != self.image_size[1]):
            raise UserError(f"image_size must be square and positive, as OpenVLA's towers are, got {self.image_size}.")

    @property
    def simulation(self) -> dict[str, Any]:
        """What makes the same initial state and the same actions the same episode.

        The seed moves the scene's fixtures. It is the protocol's 0, whatever else a run draws at random.
        """
        return {"fidelity": self.fidelity, "seed": 0, "settle_steps": self.settle_steps}

    @property
    def tasks(self) -> list[int]:
        """The tasks of the run: task_ids, or task_id alone."""
        return list(self.task_ids) if self.task_ids is not None else [self.task_id]
