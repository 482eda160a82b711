"""`torchrl-vla bench checkpoint`: a model with random weights written in upstream's format and loaded back."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchrl_vla.config.validation import check_fields, positive
from torchrl_vla.errors import UserError

__all__ = ["CheckpointBench"]

#: Peak host memory of loading onto a GPU, in sizes of the largest shard.
_WANTED_SHARDS = 1.2
_GIB = 2**30


@dataclass
class CheckpointBench:
    """Time and peak memory of saving and loading a checkpoint, and whether every bit comes back.

    Each is measured in a process of its own. Then follows what `torchrl-vla doctor` predicts of memory, beside what a
    forward pass and a training step take.

    Raises:
        ValueError: a value is out of range, or there is no GPU for the 7B model.
    """

    model: Literal["7b", "tiny"] = "7b"
    """7b or tiny; tiny runs on a CPU too, to try the measurement itself."""
    device: str = "auto"
    """Where the model is made and loaded."""
    batch_size: int = 8
    """Decisions of the forward pass and of the training step."""
    folder: Path | None = None
    """Where to write the checkpoint (15.1 GB for 7b; it stays there); None: a temporary folder, removed at the end."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self, "batch_size")
        if self.folder is not None and self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} exists already: choose another folder, or leave it out.")

    def run(self) -> None:
        """Measure, print, and write the file."""
        from torchrl_vla.bench.checkpoint_phases import load, load_4bit, predict, save
        from torchrl_vla.bench.measurements import Figure, Report
        from torchrl_vla.training.devices import choose_device

        device = choose_device(self.device)
        if self.model == "7b" and device.type != "cuda":
            raise UserError("the 7B model is measured on a GPU, and there is none: use --model tiny to try it out.")
        folder = self.folder or Path(tempfile.mkdtemp(prefix="checkpoint-", dir="."))
        report = Report(
            f"Checkpoint of the {self.model} model", {"device": str(device), "folder": str(folder)}, self.json
        )
        try:
            report.section("in and out", "measured", "")
            saved = _alone(save, self.model, str(device), str(folder))
            size = saved["bytes"] / 1e9
            report.note("files", f"{saved['shards']} shards, {size:.2f} GB")
            report.add(Figure("saving", "s", saved["seconds"]))
            report.add(Figure("saving, peak host memory above the process's own", "GiB", saved["host"] / _GIB))
            loaded = _alone(load, self.model, str(device), str(folder))
            shard = saved["largest_shard"]
            report.add(Figure("loading, files in the page cache", "s", loaded["seconds"]))
            report.add(Figure("loading, rate", "GB/s", size / loaded["seconds"], more_is_better=True))
            # On a CPU the weights themselves are in host memory.
            host = loaded["host"] - (loaded["weights"] if device.type == "cpu" else 0)
            report.add(Figure("loading, peak host memory / largest shard", "x", host / shard, wanted=_WANTED_SHARDS))
            if device.type == "cuda":
                report.add(Figure("loading, peak GPU memory / weights", "x", loaded["gpu"] / loaded["weights"]))
            report.note("parameters equal to the bit", f"{loaded['equal']} of {loaded['parameters']}")
            report.section("GPU memory", "measured", "doctor")
            for name, (used, predicted) in _alone(predict, str(device), str(folder), self.batch_size).items():
                if device.type == "cuda":
                    report.add(Figure(f"{name}, {self.batch_size} decisions", "GiB", used / _GIB, predicted / _GIB))
                else:
                    report.note(f"{name}, {self.batch_size} decisions, GiB (doctor alone)", f"{predicted / _GIB:.3f}")
            quantised = _alone(load_4bit, str(device), str(folder))
            if isinstance(quantised, str):
                report.note("4-bit", quantised)
            else:
                measured, predicted = quantised["gpu"], quantised["predicted"]
                report.add(Figure("4-bit weights", "GiB", measured / _GIB, predicted / _GIB))
                report.add(Figure("4-bit, loading", "s", quantised["seconds"]))
                report.add(Figure("4-bit, peak while loading", "GiB", quantised["peak"] / _GIB))
        finally:
            if self.folder is None:
                shutil.rmtree(folder, ignore_errors=True)


def _alone(phase: Callable[..., Any], *arguments: Any) -> Any:
    """Run a phase in a fresh process, whose peak of memory is then its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(phase, *arguments).result()
