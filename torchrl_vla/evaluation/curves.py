"""The learning curves of the run that a policy comes from, for its evaluation's page."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from torchrl_vla.evaluation.charts import Curve

__all__ = ["Chart", "read_metrics", "run_charts"]

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


def read_metrics(file: Path) -> tuple[list[dict[str, float]], bool]:
    """Read a run's metrics.csv, as much of it as a power cut or a full disk left.

    Args:
        file: the CSV.

    Returns:
        The rows, with the figures that each has, and whether all of the file could be read. The last value of a file
        that does not end with its line may be the beginning of a longer one, so it is left out.
    """
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    whole = text.endswith("\n")
    found = list(csv.reader(text.splitlines()))
    if not whole and found:
        found[-1] = found[-1][:-1]
    columns = found[0] if found else []
    rows = []
    for values in found[1:]:
        row: dict[str, float] = {}
        for name, value in zip(columns, values, strict=False):
            try:
                row |= {name: float(value)} if value else {}
            except ValueError:
                whole = False
        whole &= len(values) == len(columns)
        if {"update", "env_steps"} <= row.keys():
            rows.append(row)
        else:
            whole = False
    return rows, whole


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
    rows, _ = read_metrics(file)
    charts = []
    for title, percent, steps, columns in _CHARTS:
        curves = [Curve(label, points) for column, label in columns if (points := _points(rows, column))]
        if curves:
            charts.append(Chart(title, percent, steps, tuple(curves)))
    return charts


def _points(rows: list[dict[str, float]], column: str) -> list[tuple[float, float]]:
    """(env_steps, value) where a row has the column."""
    points = [(row["env_steps"], row[column]) for row in rows if column in row]
    return [point for point in points if all(map(math.isfinite, point))]
