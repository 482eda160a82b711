"""`torchrl-vla demos`: demonstrations from the scripted expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import tyro

from torchrl_vla.config.ids import Ids
from torchrl_vla.config.validation import check_fields, check_ids, fraction, non_negative, positive
from torchrl_vla.envs.processes import prepare_processes

if TYPE_CHECKING:
    from torchrl_vla.datasets import DemonstrationIndex

__all__ = ["DemosArguments", "main"]


@dataclass
class DemosArguments:
    """Record demonstrations of a scripted expert. An interrupted collection goes on when the command is repeated."""

    LARGEST: ClassVar[Mapping[str, int]] = {
        "episodes_per_task": 10_000,
        "camera_size": 4096,
        "num_workers": 4096,
        "extra_steps": 1_000_000,
    }

    out: Path
    """Folder of the data set."""
    task_suite: str = "libero_spatial"
    """LIBERO suite."""
    task_ids: Ids = None
    """Tasks, such as 0-3 or 0 4 9; None: all."""
    episodes_per_task: int = 50
    """Episodes tried of each task; failed ones are counted and not stored."""
    init_state_ids: Ids = None
    """Initial states to start from, such as 0-39; None: all."""
    sampled_init_states: int | None = None
    """Start from initial states drawn from the tasks' regions with this seed, as many as there are official ones and
    numbered from 0 too; None: from the official ones."""
    noise: float = 0.0
    """Standard deviation of noise on every executed action; labels stay clean."""
    perturb_prob: float = 0.0
    """Share of episodes in which the arm is pushed off its way a few times, so that recoveries are shown."""
    camera_size: int = 256
    """Height and width of the images in pixels."""
    wrist_camera: bool = False
    """Record the wrist camera too."""
    extra_steps: int = 8
    """Control steps recorded after success."""
    num_workers: int | None = None
    """Processes; None: one per core."""
    worker_timeout: float = 600.0
    """Seconds after which a worker that does not answer is replaced."""
    seed: int = 0
    """Seeds noise, perturbations and the poses of fixtures."""
    export_lerobot: Path | None = None
    """New folder for the demonstrations in LeRobot's format too, if the library lerobot is installed."""

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self, "episodes_per_task", "camera_size", "num_workers", "worker_timeout")
        non_negative(self, "noise", "extra_steps")
        fraction(self, "perturb_prob")
        check_ids(self, "task_ids", "init_state_ids")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    options = tyro.cli(DemosArguments, prog="torchrl-vla demos", args=arguments)
    prepare_processes()
    from torchrl_vla.files import check_output_folder

    check_output_folder(options.out, "--out")
    from torchrl_vla.training.run_lock import lock_run
    from torchrl_vla.training.stopping import Stopped, StopRequest

    if options.export_lerobot is not None:
        from torchrl_vla.datasets.lerobot_export import check_lerobot

        check_lerobot(options.export_lerobot)
    with lock_run(options.out, work="recording", option="--out"), StopRequest("the notes of what was recorded") as stop:
        try:
            index = _collect(options, stop.check)
        except Stopped:
            print(f"Ended early; what was recorded is in {options.out}. To go on, repeat the command.")
            raise
    print(f"{'task':>4}  {'success':>7}  {'failed':>6}  {'dropped':>7}  instruction")
    for task_id, counts in sorted(index.counts().items()):
        row = f"{task_id:>4}  {counts['success']:>7}  {counts['failed']:>6}  {counts['dropped']:>7}"
        print(f"{row}  {index.instructions[task_id]}")
    total = sum(index.counts().values(), start=type(counts)())
    print(f" all  {total['success']:>7}  {total['failed']:>6}  {total['dropped']:>7}  in {options.out}")
    if options.export_lerobot is not None:
        from torchrl_vla.datasets import DemonstrationDataset
        from torchrl_vla.datasets.lerobot_export import export_lerobot

        count = export_lerobot(DemonstrationDataset(options.out), options.export_lerobot)
        print(f"{count} episodes in LeRobot's format in {options.export_lerobot}")


def _collect(options: DemosArguments, check: Callable[[], None]) -> DemonstrationIndex:
    from torchrl_vla.demonstrations.collect import collect_demonstrations
    from torchrl_vla.versions import versions

    return collect_demonstrations(
        options.out,
        task_suite=options.task_suite,
        episodes_per_task=options.episodes_per_task,
        task_ids=options.task_ids,
        init_state_ids=options.init_state_ids,
        sampled_init_states=options.sampled_init_states,
        noise=options.noise,
        perturb_prob=options.perturb_prob,
        camera_size=options.camera_size,
        wrist_camera=options.wrist_camera,
        extra_steps=options.extra_steps,
        num_workers=options.num_workers,
        timeout=options.worker_timeout,
        seed=options.seed,
        versions=versions(),
        check=check,
    )
