"""The folder of a run: made once, never written over, and described well enough to be repeated."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrl_vla.config import TrainConfig
from torchrl_vla.config.finetune import FinetuneConfig
from torchrl_vla.files import read_json
from torchrl_vla.versions import versions

__all__ = [
    "describe_run",
    "log_to",
    "noted_preset",
    "open_run_folder",
]


def open_run_folder(config: TrainConfig, preset: str) -> Path:
    """Make the run's folder, or open the one to resume.

    Args:
        config: the run; `run_dir` None makes `runs/SUITE-DATE-TIME`.
        preset: name of the preset, noted with the configuration.

    Raises:
        ValueError: the folder exists already and the run is not a resumed one.
    """
    if config.run_dir is None:
        config.run_dir = Path("runs") / f"{config.env.task_suite}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = config.run_dir
    if not config.resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} exists already. Choose another --run-dir, or go on with the run in it: "
            f"torchrl-vla train --resume --run-dir {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        describe_run(config, folder, preset=preset)
    return folder


def describe_run(config: TrainConfig | FinetuneConfig, folder: Path, **about: Any) -> None:
    """Note in a run's folder with which options, which command and which versions it runs, or goes on.

    A run that is resumed goes on with these options, and so it does when it is resumed once more; older notes stay
    beside the new ones.

    Args:
        config: the options.
        folder: of the run.
        about: what else to note.
    """
    path = folder / "config.json"
    if path.exists() and _options(type(config).load(path)) == _options(config):
        return
    about |= {"command": sys.argv, "started": time.strftime("%Y-%m-%d %H:%M:%S"), **versions()}
    fresh = {name: folder / f"{name}.partial" for name in ("config.json", "about.json")}
    dataclasses.replace(config, resume=False).save(fresh["config.json"])
    fresh["about.json"].write_text(json.dumps(about, indent=2) + "\n")
    for name, partial in fresh.items():
        # A run without these notes could not be resumed: the old ones go when the new ones are written.
        _keep_old(folder / name)
        partial.replace(folder / name)


def noted_preset(folder: Path) -> str | None:
    """The preset that a run was started with, as its folder says.

    Args:
        folder: of the run.
    """
    about = folder / "about.json"
    return read_json(about).get("preset") if about.is_file() else None


def _options(config: TrainConfig | FinetuneConfig) -> dict[str, Any]:
    """All but where the run lies, which may have been moved."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("resume", "run_dir", "out")}


def _keep_old(path: Path) -> None:
    """Move a file that is about to be written anew aside, to `NAME-1.json`, or the next number that is free.

    Args:
        path: the file; nothing happens if there is none.
    """
    if not path.exists():
        return
    number = 1
    while (aside := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    path.rename(aside)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append what this package logs, and Python's warnings, to a file.

    Args:
        path: the file.
    """
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("torchrl_vla")
    sources = (package, logging.getLogger("py.warnings"))
    level = package.level
    package.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for source in sources:
        source.addHandler(handler)
    try:
        yield
    finally:
        for source in sources:
            source.removeHandler(handler)
        logging.captureWarnings(False)
        package.setLevel(level)
        handler.close()
