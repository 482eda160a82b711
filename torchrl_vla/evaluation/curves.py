"""The learning curves of the run that a policy comes from, for its evaluation's page."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from torchrl_vla.evaluation.charts import Curve

__all__ = ["Chart", "run_charts"]

_METRICS = "metrics.csv"
#: Title, whether values are shares, what steps are, and (column, label) of each curve.
_CHARTS = (
    (
        "Success in the run",
        True,
        "control steps",
        (("rollout/success_rate", "rollouts (sampled)"), ("val/success_rate", "validation")),
    ),
    (
        "Accuracy of the action tokens",
        True,
        "optimizer steps",
        (("train/accuracy", "training"), ("val/accuracy", "held-out samples")),
    ),
    (
        "L1 distance of the actions",
        False,
        "optimizer steps",
        (("train/l1", "training"), ("val/l1", "held-out samples")),
    ),
)


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes.

    Args:
        title: what they show.
        percent: whether they are shares.
        steps: what their steps are.
        curves: at least one, each with a point.
    """

    title: str
    percent: bool
    steps: str
    curves: tuple[Curve, ...]


def run_charts(checkpoint: str) -> list[Chart]:
    """Charts of the run in whose folder a checkpoint lies; none where it lies in no run's folder, or is no folder.

    Args:
        checkpoint: as `torchrl-vla evaluate` takes it, such as `RUN/policy`.
    """
    folder = Path(checkpoint).resolve()
    if not folder.is_dir():  # bundled:tiny or a hub id: the run in the current folder is not its own
        return []
    file = next((place / _METRICS for place in (folder, *folder.parents[:2]) if (place / _METRICS).is_file()), None)
    if file is None:
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    charts = []
    for title, percent, steps, columns in _CHARTS:
        curves = [Curve(label, points) for column, label in columns if (points := _points(rows, column))]
        if curves:
            charts.append(Chart(title, percent, steps, tuple(curves)))
    return charts


def _points(rows: list[dict[str, str]], column: str) -> list[tuple[float, float]]:
    """(env_steps, value) where a row has the column."""
    points = [(float(row["env_steps"]), float(row[column])) for row in rows if row.get(column)]
    return [point for point in points if all(map(math.isfinite, point))]
