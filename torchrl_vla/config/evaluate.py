"""One evaluation: `torchrl-vla evaluate`, `torchrl_vla.recipes.evaluate.evaluate_checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from torchrl_vla.config.ids import Ids
from torchrl_vla.config.validation import check_fields, check_ids, positive, temperature
from torchrl_vla.errors import UserError

__all__ = ["EvaluateConfig"]


@dataclass
class EvaluateConfig:
    """Run every task from fixed initial states, greedily, and report success with 95% intervals.

    Raises:
        ValueError: a value is out of range.

    Examples:
        >>> EvaluateConfig("runs/four/policy", task_ids=[0, 1, 2, 3]).initial_states
        'the official ones, from the first on'
    """

    LARGEST: ClassVar[Mapping[str, int]] = {
        "episodes_per_task": 100_000,
        "num_envs": 4096,
        "max_episode_steps": 1_000_000,
    }

    pretrained_checkpoint: Annotated[str, tyro.conf.arg(aliases=["--checkpoint"])]
    """Folder or hub id of the policy, such as RUN/policy."""
    task_suite: str = "libero_spatial"
    """LIBERO suite, or one of LIBERO-PRO's."""
    task_ids: Ids = None
    """Tasks to run, such as 0 1 2 or 0-3; None: all of the suite."""
    episodes_per_task: int | None = None
    """Episodes per task, from its initial states in order; None: 50, as the protocol asks, or one from each state where
    there are fewer. Greedy episodes run no state twice; with a temperature, states start over."""
    init_state_ids: Ids = None
    """Initial states to use, such as 0 1 2 or 0-39; None: all of the task's."""
    sampled_init_states: int | None = None
    """Start from initial states drawn from the tasks' regions with this seed, as many as there are official ones and
    numbered from 0 too: none is official, but they are those of `demos` with the same number. None: from the official
    ones."""
    compare_with: str | None = None
    """Evaluation to compare with, on the same initial states: a folder with a report.json, or another checkpoint, which
    is then evaluated too."""
    num_envs: int = 8
    """Simulators run side by side."""
    eval_temperature: Annotated[float, tyro.conf.arg(aliases=["--temperature"])] = 0.0
    """Sampling temperature; 0 is greedy, as the protocol asks."""
    max_episode_steps: int | None = None
    """Horizon in control steps; None: the suite's own."""
    fidelity: Literal["exact", "fast"] = "exact"
    """exact: stock LIBERO's bits; fast: cheaper physics and images, not comparable with published figures."""
    proprio_format: Literal["auto", "axis_angle", "quaternion"] = "auto"
    """How the policy reads the robot's state; auto: as it was trained, and axis_angle where its folder does not say."""
    num_images_in_input: int = 1
    """Cameras the policy looks through: 1 agentview, 2 with the wrist camera."""
    unnorm_key: str | None = None
    """Which action statistics of the checkpoint to use; None: the suite's."""
    action_mode: Literal["auto", "tokens", "l1", "autoregressive"] = "auto"
    """tokens: chunks of action tokens, decoded in parallel (OpenVLA-OFT); l1: the L1 head; autoregressive: one token
    after the other, one control step at a time (base OpenVLA); auto: as the checkpoint was trained."""
    device: str = "auto"
    """Device of the policy."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto: as they are stored, and float32 on a CPU. Runs without adapters store float32."""
    worker_timeout: float = 120.0
    """Seconds after which a simulating process that does not answer is replaced and its episodes run again; five times
    as long while it starts and resets."""
    seed: int = 0
    """Seeds the poses of fixtures (the protocol's is 0) and, with a temperature, the sampling of actions."""
    videos: bool = True
    """Record videos of one success and one failure of each task."""
    out: Path | None = None
    """Folder for report.html, report.json, episodes.csv and videos; None: evaluations/SUITE-DATE-TIME."""
    resume: bool = False
    """Go on with an evaluation that was interrupted, in `out`: the episodes that its report has are not run again."""

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self, "episodes_per_task", "num_envs", "worker_timeout", "max_episode_steps")
        temperature(self, "eval_temperature")
        check_ids(self, "task_ids", "init_state_ids")
        if self.resume and self.out is None:
            raise UserError("resume goes on with the evaluation in a folder: name it with --out.")
        if self.num_images_in_input not in (1, 2):
            raise UserError(
                "num_images_in_input must be 1 (agentview) or 2 (with the wrist camera), "
                f"got {self.num_images_in_input}."
            )

    @property
    def simulation(self) -> dict[str, Any]:
        """What makes the same initial state and the same actions the same episode."""
        return {"fidelity": self.fidelity, "seed": self.seed, "sampled_init_states": self.sampled_init_states}

    @property
    def initial_states(self) -> str:
        """The initial states in words."""
        which = (
            "from the first on"
            if self.init_state_ids is None
            else "numbers " + ", ".join(map(str, self.init_state_ids))
        )
        if self.sampled_init_states is not None:
            return (
                f"sampled from the tasks' regions with seed {self.sampled_init_states}, {which}; none is official, and "
                f"they are those of demos --sampled-init-states {self.sampled_init_states}"
            )
        return f"the official ones, {which}"
