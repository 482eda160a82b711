"""What README.md and the pages of docs/ tell the reader to type works as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro

from torchrl_vla.config import EvaluateConfig, FinetuneConfig, TrainConfig
from torchrl_vla.config.presets import PRESETS

ROOT = Path(__file__).parents[1]
CONFIGS = {"train": TrainConfig, "evaluate": EvaluateConfig, "finetune": FinetuneConfig}
#: Pages whose commands are those of the day that their date names.
DATED = {"results.md", "history.md", "performance.md", "tried.md", "eight_bits_study.md"}
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in DATED)]

UNKNOWN = pytest.mark.xfail(raises=SystemExit, strict=True, reason="no such option")


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def _commands() -> list[str]:
    """Lines of the pages that run a command whose options are a configuration's fields."""
    lines = (
        line
        for page in PAGES
        for block in _blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    )  # fmt: skip
    return sorted({line for line in lines if re.match(rf"torchrl-vla ({'|'.join(CONFIGS)}) ", line)})


@pytest.mark.parametrize("line", [*_commands(), pytest.param("torchrl-vla train --nothing 3", marks=UNKNOWN)])
def test_options_in_the_documents_exist(line: str) -> None:
    _, command, *arguments = shlex.split(line, comments=True)
    if "--help" not in arguments:
        tyro.cli(tyro.conf.OmitArgPrefixes[CONFIGS[command]], args=arguments)


def test_the_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 65


def test_the_readme_names_every_preset() -> None:
    assert f"`--preset {' | '.join(PRESETS)}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8"))]
    assert len(links) > 10
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_tests_that_the_pages_name_exist() -> None:
    """docs/reliability.md says which test holds each sentence."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")))
    tests = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert named and named <= tests


@pytest.mark.simulator
def test_the_swap_of_the_readme_collects() -> None:
    (block,) = _blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(block, names)
    try:
        batch = next(iter(names["collector"]))
        assert (
            batch.shape == (4, 16) and batch["action"].shape == (4, 16, 8, 7) and torch.isfinite(batch["action"]).all()
        )
    finally:
        names["collector"].shutdown()
