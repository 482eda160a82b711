"""`torchrl-vla bench gpu`: rollout, update and decoding on one GPU, beside a plain loop over samples and the floor."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torchrl_vla.config.validation import check_fields, positive
from torchrl_vla.errors import UserError

__all__ = ["GpuBench", "SECTIONS"]

SECTIONS = ("floor", "naive", "rollout", "update", "profile", "autoregressive", "attention", "capped", "loop")
"""In this order: naive comes before the layers are compiled, capped and loop after everything else."""


@dataclass
class GpuBench:
    """Speed and memory of a policy with random weights and the real shapes.

    Every figure stands beside what is wanted, the plain loop over samples, and the floor that this card's own matmuls
    and copies set.

    Raises:
        ValueError: a value is out of range, or there is no GPU for the 7B model.
    """

    LARGEST: ClassVar[Mapping[str, int]] = {"num_envs": 4096, "decisions": 100_000}

    model: str = "7b"
    """7b or tiny; tiny runs on a CPU too, to try the measurement itself."""
    sections: tuple[str, ...] = SECTIONS
    """Which parts to measure."""
    section_seconds: float = 120.0
    """A part that takes longer is given up, and the next one begins."""
    num_envs: int = 16
    """LIBERO environments of the whole loop."""
    decisions: int = 64
    """Decisions of the measured update."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model not in ("7b", "tiny"):
            raise UserError(f"model must be 7b or tiny, got {self.model!r}.")
        unknown = sorted(set(self.sections) - set(SECTIONS))
        if unknown or not self.sections:
            raise UserError(f"sections must be among {', '.join(SECTIONS)}, got {', '.join(unknown) or 'none'}.")
        positive(self, "section_seconds", "num_envs", "decisions")

    def run(self) -> None:
        """Measure, print, and write the file."""
        import torch

        from torchrl_vla.bench.gpu_policy import Bench
        from torchrl_vla.bench.gpu_sections import MEASURES
        from torchrl_vla.bench.measurements import Report

        started = time.perf_counter()
        if self.model == "7b" and not torch.cuda.is_available():
            raise UserError("the 7B model is measured on a GPU, and there is none: use --model tiny to try it out.")
        settings = {"model": self.model, "sections": ", ".join(self.sections), "decisions": self.decisions}
        report = Report("GPU: a decision of 7B is 349 tokens" if self.model == "7b" else "tiny", settings, self.json)
        bench = Bench(self.model, num_envs=self.num_envs, num_decisions=self.decisions, report=report, started=started)
        report.section("what", "measured", "naive")
        for name in SECTIONS:
            if name in self.sections:
                self._measure(name, MEASURES[name], bench, report)
        report.note("seconds in all", round(time.perf_counter() - started, 1))

    def _measure(self, name: str, measure: Callable[[Any], None], bench: Any, report: Any) -> None:
        """One part; what breaks is reported, and what follows still measured."""
        started = time.perf_counter()
        try:
            with _at_most(self.section_seconds):
                measure(bench)
        except Exception as error:
            report.note(f"{name} failed", f"{type(error).__name__}: {error}"[:600])
            traceback.print_exc(limit=-6)
        bench.clean()
        report.note(f"{name}: seconds", round(time.perf_counter() - started, 1))


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
