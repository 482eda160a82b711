"""The folder of a run: made once, never written over, and described well enough to be repeated."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrl_vla.checkpoints.files import read_json
from torchrl_vla.config import TrainConfig
from torchrl_vla.config.finetune import FinetuneConfig

__all__ = [
    "NOT_A_PACKAGE",
    "describe_run",
    "log_to",
    "noted_preset",
    "open_run_folder",
    "package_version",
    "versions",
    "written_whole",
]

#: In the place of a version.
NOT_A_PACKAGE = "not installed as a package"

_PACKAGES = ("torchrl-vla", "torch", "torchrl", "tensordict", "transformers", "peft", "mujoco", "robosuite", "numpy")


def package_version(name: str) -> str:
    """Version of an installed package; `NOT_A_PACKAGE` for one that is missing or lies on PYTHONPATH alone.

    Args:
        name: as pip knows it.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return NOT_A_PACKAGE


def versions() -> dict[str, str]:
    """Versions of what a result depends on, by package, and the machine they ran on."""
    found = {name: package_version(name) for name in _PACKAGES}
    return found | {"python": platform.python_version(), "machine": f"{platform.machine()} {platform.system()}"}


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
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of another as a whole once everything is written.

    Args:
        folder: the one to make or replace. If writing fails, it is left as it was.
    """
    folder = folder.resolve()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    previous = folder.with_name(f"{folder.name}.previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


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
