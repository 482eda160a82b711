"""Where a run's figures go: console, CSV, TensorBoard, Weights & Biases, and a learning-curve picture."""

from __future__ import annotations

import csv
import importlib.util
import logging
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrl.record.loggers import Logger
from torchrl.record.loggers.tensorboard import TensorboardLogger
from tqdm import tqdm

from torchrl_vla.config import TrainConfig
from torchrl_vla.errors import UserError
from torchrl_vla.evaluation.curves import read_metrics
from torchrl_vla.evaluation.videos import FRAMES_PER_SECOND, write_mp4
from torchrl_vla.files import whole_file
from torchrl_vla.training.health import Health

logger = logging.getLogger(__name__)

__all__ = ["RunLogger", "SilentLogger", "check_wandb", "described", "format_table"]

# The rows of the console's table: title, then (label, metric, format) per cell.
_TABLE = (
    (
        "rollout",
        (
            ("success", "rollout/success_rate", "{:.1%}"),
            ("return", "rollout/mean_return", "{:.3f}"),
            ("length", "rollout/mean_length", "{:.0f} steps"),
            ("groups kept", "rollout/groups_kept", "{:.0f}"),
            ("of", "rollout/groups", "{:.0f}"),
        ),
    ),
    (
        "update",
        (
            ("policy loss", "train/policy_loss", "{:.4f}"),
            ("clip fraction", "train/clipfrac", "{:.3f}"),
            ("KL", "train/approx_kl", "{:.2e}"),
            ("entropy", "train/entropy", "{:.3f}"),
            ("gradient norm", "train/grad_norm", "{:.3f}"),
        ),
    ),
    ("validation", (("success", "val/success_rate", "{:.1%}"), ("length", "val/mean_length", "{:.0f} steps"))),
    (
        "time",
        (
            ("rollout", "time/rollout_seconds", "{:.1f} s"),
            ("decisions/s", "time/rollout_decisions_per_second", "{:.1f}"),
            ("update", "time/update_seconds", "{:.1f} s"),
            ("decisions/s", "time/update_decisions_per_second", "{:.1f}"),
            ("validation", "time/val_seconds", "{:.1f} s"),
        ),
    ),
)


def format_table(metrics: Mapping[str, float], title: str) -> str:
    """One update's figures as lines of text; figures that the update does not have are left out.

    Args:
        metrics: figures by name, as `RunLogger.log` takes them.
        title: first line.

    Examples:
        >>> print(format_table({"rollout/success_rate": 0.5}, "update 1"))
        update 1
          rollout     success 50.0%
    """
    lines = [title]
    for phase, cells in _TABLE:
        shown = [f"{label} {form.format(metrics[name])}" for label, name, form in cells if name in metrics]
        if shown:
            lines.append(f"  {phase:<11} " + "   ".join(shown))
    return "\n".join(lines)


def check_wandb() -> None:
    """Make sure that W&B is installed and logged in, before any long work starts.

    Raises:
        ValueError: it is not; the message says what to do.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "use_wandb is on, but wandb is not installed: pip install 'torchrl-vla[wandb]', or use --no-wandb."
        ) from error
    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.login(prompt=False):
        raise UserError(
            "use_wandb is on, but you are not logged in: run `wandb login`, set WANDB_API_KEY, "
            "or WANDB_MODE=offline to log locally; --no-wandb turns it off."
        )


def described(config: TrainConfig) -> dict[str, Any]:
    """Return the options of a run for W&B, where TorchRL writes under "env" what it runs on."""
    return {"ppo": vars(config.ppo), "actor": vars(config.actor)}


def _encodes_videos(sink: Logger) -> bool:
    """Whether moviepy is there: TensorBoard needs its first version, which has `moviepy.editor`."""
    found = importlib.util.find_spec("moviepy") is not None
    return found and (not isinstance(sink, TensorboardLogger) or importlib.util.find_spec("moviepy.editor") is not None)


class RunLogger:
    """Writes every figure of a run to its folder, and to W&B if wanted.

    Args:
        run_dir: the run's folder; gets `metrics.csv`, `tensorboard/`, `learning_curve.png` and `videos/`.
        use_wandb: log to Weights & Biases too.
        wandb_entity: W&B user or team.
        config: the run's parameters, shown with it on W&B.
        health: reads every row, and what it says is printed.

    Examples:
        >>> import tempfile
        >>> logger = RunLogger(Path(tempfile.mkdtemp()))
        >>> logger.log({"rollout/success_rate": 0.25}, update=1, env_steps=1760)
        >>> logger.rows[0]["env_steps"]
        1760.0
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        use_wandb: bool = False,
        wandb_entity: str | None = None,
        config: Mapping[str, Any] | None = None,
        health: Health | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.health = health
        self.csv_path = run_dir / "metrics.csv"
        self.curve_path = run_dir / "learning_curve.png"
        self.rows: list[dict[str, float]] = []
        self._columns: list[str] = []
        self._missed_videos = False
        self.loggers: list[Logger] = [TensorboardLogger(exp_name="tensorboard", log_dir=str(run_dir))]
        if use_wandb:
            from torchrl.record.loggers.wandb import WandbLogger

            # A resumed run goes on as the same run on W&B.
            identity = run_dir / "wandb_id"
            if not identity.exists():
                with whole_file(identity) as partial:
                    partial.write_text(secrets.token_hex(4))
            self.loggers.append(
                WandbLogger(
                    exp_name=run_dir.name,
                    save_dir=str(run_dir),
                    id=identity.read_text(),
                    project="torchrl-vla",
                    entity=wandb_entity,
                    config=dict(config or {}),
                )
            )

    def restore(self, update: int) -> None:
        """Take up the CSV of an interrupted run; rows after `update` will be made again and are set aside, not lost.

        Args:
            update: the newest one that stays.
        """
        if not self.csv_path.exists():
            return
        rows, whole = read_metrics(self.csv_path)
        if not whole:  # a kill or a full disk cut it: what can be read goes on, and the file itself is kept
            aside = self.run_dir / f"metrics.damaged-{secrets.token_hex(4)}.csv"
            shutil.copyfile(self.csv_path, aside)
            self.print(f"{self.csv_path} was cut: {len(rows)} rows of it can be read, and it is kept as {aside.name}.")
        self.rows = [row for row in rows if row["update"] <= update]
        if len(self.rows) < len(rows):
            aside = self.run_dir / f"metrics.after-update-{update}.csv"
            self._write(aside, rows)
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self._write(self.csv_path, self.rows)

    def log(self, metrics: Mapping[str, float], *, update: int, env_steps: int) -> None:
        """Add one row of figures; those of the newest row's update join that row.

        Args:
            metrics: figures by name, `phase/figure`.
            update: number of the update; 0 is before the first.
            env_steps: control steps collected so far: the x axis of every plot.
        """
        if self.health is not None:
            metrics = {**metrics, **self.health.figures()}
        row = {"update": float(update), "env_steps": float(env_steps), **{k: float(v) for k, v in metrics.items()}}
        joins = bool(self.rows) and self.rows[-1]["update"] == row["update"]
        if joins:
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        fresh = [name for name in row if name not in self._columns]
        if fresh or joins:
            self._columns += fresh
            self._write(self.csv_path, self.rows)
        else:
            with self.csv_path.open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns, restval="").writerow(row)
        for name, value in metrics.items():
            for sink in self.loggers:
                sink.log_scalar(name, float(value), step=env_steps)
        for warning in [] if self.health is None else self.health.warnings(self.rows):
            self.print(f"Watch out: {warning}")

    def _write(self, path: Path, rows: list[dict[str, float]]) -> None:
        columns = list(dict.fromkeys([*self._columns, *(name for row in rows for name in row)]))
        with whole_file(path) as partial, partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)

    def log_video(self, name: str, frames: np.ndarray, *, env_steps: int) -> Path:
        """Write a film to the run's `videos/`, and to TensorBoard and W&B where moviepy is installed.

        Args:
            name: `phase/figure`.
            frames: as :func:`~torchrl_vla.evaluation.videos.write_mp4` takes them.
            env_steps: control steps collected so far.

        Returns:
            The file.
        """
        path = self.run_dir / "videos" / f"{name.replace('/', '-')}-{env_steps}.mp4"
        write_mp4(path, frames)
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None]
        for sink in self.loggers:
            if _encodes_videos(sink):
                sink.log_video(name, video, step=env_steps, fps=FRAMES_PER_SECOND)
            elif not self._missed_videos:
                self._missed_videos = True
                where = type(sink).__name__
                self.print(f"Videos are in {path.parent} alone: pip install 'moviepy<2' shows them in {where} too.")
        return path

    def draw(self) -> None:
        """Draw the learning curve: success in rollouts and in validation, over control steps."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, label, style in (
            ("rollout/success_rate", "rollouts (sampled)", "o-"),
            ("val/success_rate", "validation (greedy)", "s--"),
        ):
            points = [(row["env_steps"], row[name]) for row in self.rows if not math.isnan(row.get(name, math.nan))]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(xlabel="control steps collected", ylabel="success rate", ylim=(-0.03, 1.03), title=self.run_dir.name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        figure.savefig(self.curve_path, dpi=120)

    def print(self, text: str) -> None:
        """Write to the console, without breaking a progress bar, and to the run's log."""
        tqdm.write(text)
        logger.info(text)

    def close(self) -> None:
        """Flush what is still in memory."""
        for sink in self.loggers:
            experiment = sink.experiment
            for method in ("close", "finish"):
                if hasattr(experiment, method):
                    getattr(experiment, method)()
                    break


class SilentLogger(RunLogger):
    """Keeps a run's figures to itself: for the processes beside the one that writes.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.rows, self.loggers, self.health = run_dir, [], [], None
        self.csv_path, self.curve_path = run_dir / "metrics.csv", run_dir / "learning_curve.png"

    def restore(self, update: int) -> None:
        """Nothing to take up."""

    def log(self, metrics: Mapping[str, float], *, update: int, env_steps: int) -> None:
        """Remember the figures."""
        self.rows.append({"update": float(update), "env_steps": float(env_steps), **metrics})

    def draw(self) -> None:
        """Draw nothing."""

    def print(self, text: str) -> None:
        """Say nothing on the console."""
        logger.info(text)
