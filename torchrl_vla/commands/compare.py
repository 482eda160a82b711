"""`torchrl-vla compare`: two finished evaluations, paired episode by episode; nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from torchrl_vla.errors import UserError
from torchrl_vla.files import check_output_folder, write_json

__all__ = ["CompareConfig", "main"]


@dataclass
class CompareConfig:
    """Compare two evaluations of the same initial states: difference with interval, and McNemar's exact test."""

    baseline: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BASELINE")]
    """Folder (or report.json) of the evaluation to compare with."""
    new: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NEW")]
    """Folder (or report.json) of the evaluation to be judged."""
    out: Path | None = None
    """Folder for comparison.json and comparison.html; None: print only."""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options.
    """
    config = tyro.cli(CompareConfig, prog="torchrl-vla compare", args=arguments)

    from torchrl_vla.evaluation.comparison import compare
    from torchrl_vla.evaluation.html import write_html
    from torchrl_vla.evaluation.report import EvaluationReport

    new = EvaluationReport.load(config.new)
    comparison = compare(EvaluationReport.load(config.baseline), new)
    print(comparison)
    if config.out is None:
        return
    check_output_folder(config.out, "--out")
    if (config.out / "comparison.json").exists():
        raise UserError(f"{config.out} holds a comparison already: choose another --out.")
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "comparison.json", comparison.to_dict())
    write_html(config.out / "comparison.html", new, comparison=comparison)
    print(f"Page: {config.out / 'comparison.html'}   Figures: {config.out / 'comparison.json'}")
