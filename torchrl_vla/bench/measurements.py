"""What a measurement found: who measured it on what, ratios beside the wanted ones, as a table and as JSON."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchrl_vla.errors import UserError
from torchrl_vla.files import write_json
from torchrl_vla.versions import versions

__all__ = ["Figure", "Report", "machine"]

_NAME_WIDTH, _COLUMN_WIDTH = 54, 17


@dataclass(frozen=True)
class Figure:
    """One thing measured: medians over rounds, and what was hoped for.

    Args:
        name: what was measured.
        unit: of `ours` and `reference`.
        ours: our median.
        reference: the median of what ours is compared with; None: there is none.
        more_is_better: whether a ratio above 1 means that `ours` is the larger one.
        wanted_ratio: least number of times that ours should be better.
        wanted: least (or, where less is better, greatest) value that ours should have.

    Examples:
        >>> figure = Figure("a step", "ms", ours=2.0, reference=30.0, wanted_ratio=12)
        >>> figure.ratio, figure.reached
        (15.0, True)
    """

    name: str
    unit: str
    ours: float
    reference: float | None = None
    more_is_better: bool = False
    wanted_ratio: float | None = None
    wanted: float | None = None

    @classmethod
    def of_rounds(cls, name: str, unit: str, ours: Sequence[float], reference: Sequence[float], **rest: Any) -> Figure:
        """Return a figure from one value per round of each side; `rest` are further fields."""
        return cls(name, unit, statistics.median(ours), statistics.median(reference), **rest)

    @property
    def ratio(self) -> float | None:
        """How many times better ours is."""
        if self.reference is None:
            return None
        return self.ours / self.reference if self.more_is_better else self.reference / self.ours

    @property
    def reached(self) -> bool | None:
        """Whether it is as good as wanted; None where nothing was."""
        if self.wanted_ratio is not None and self.ratio is not None:
            return self.ratio >= self.wanted_ratio
        if self.wanted is not None:
            return self.ours >= self.wanted if self.more_is_better else self.ours <= self.wanted
        return None

    def __str__(self) -> str:
        ours = f"{_number(self.ours)} {self.unit}"
        reference = "" if self.reference is None else f"{_number(self.reference)} {self.unit}"
        ratio = "" if self.ratio is None else f"{_number(self.ratio)} x"
        wanted = ""
        if self.wanted_ratio is not None:
            wanted = f"{_number(self.wanted_ratio)} x"
        elif self.wanted is not None:
            wanted = f"{_number(self.wanted)} {self.unit}"
        verdict = {True: "reached", False: "missed", None: ""}[self.reached]
        return _row(self.name, ours, reference, ratio, wanted, verdict)


class Report:
    """Prints every figure as it comes, and keeps the JSON file up to date, so that an interrupted run loses nothing.

    Args:
        title: what is measured.
        settings: how.
        json_file: where to write the figures too; None: nowhere.

    Raises:
        ValueError: the file's folder does not exist.
    """

    def __init__(self, title: str, settings: dict[str, object], json_file: Path | None = None) -> None:
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise UserError(f"{json_file} cannot be written: there is no folder {json_file.absolute().parent}.")
        self.figures: list[Figure] = []
        self.notes: dict[str, object] = {}
        self._json_file = json_file
        self._header = {
            "title": title,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": sys.argv,
            "machine": machine(),
            "versions": versions(),
            "settings": settings,
        }
        tqdm.write(f"{title}, {self._header['date']}")
        for name, value in {**machine(), **settings}.items():
            tqdm.write(f"  {name}: {value}")
        packages = ("mujoco", "robosuite", "torch", "torchrl", "python")
        tqdm.write("  versions: " + ", ".join(f"{name} {versions()[name]}" for name in packages))

    def section(self, title: str, ours: str, reference: str) -> None:
        """Print the head of a table.

        Args:
            title: of the table.
            ours: of the column of our values.
            reference: of the column of what they are compared with.
        """
        tqdm.write("\n" + _row(title, ours, reference, "ratio", "wanted", ""))
        tqdm.write("-" * (_NAME_WIDTH + 5 * _COLUMN_WIDTH))

    def add(self, figure: Figure) -> None:
        """Print and keep a figure."""
        self.figures.append(figure)
        tqdm.write(str(figure))
        self._write()

    def note(self, name: str, value: object) -> None:
        """Print and keep what is no figure: a choice that was made, a part that failed, a floor."""
        self.notes[name] = value
        tqdm.write(f"{name}: {value}")
        self._write()

    def _write(self) -> None:
        if self._json_file is not None:
            figures = [{**asdict(item), "ratio": item.ratio, "reached": item.reached} for item in self.figures]
            content = {**self._header, "figures": figures, "notes": self.notes}
            write_json(self._json_file, content)


def machine() -> dict[str, str]:
    """Processor, cores that this process may use, memory and GPUs of this machine."""
    processor = "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass  # no such file beside Linux
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": processor,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "GPU": ", ".join(gpus) or "none",
        "load before": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def _row(name: str, *cells: str) -> str:
    return f"{name:<{_NAME_WIDTH}}" + "".join(f"{cell:>{_COLUMN_WIDTH}}" for cell in cells)


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
