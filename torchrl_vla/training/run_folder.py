"""The folder of a run: made once, never written over, and described well enough to be repeated."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrl_vla.config import FinetuneConfig, TrainConfig
from torchrl_vla.errors import UserError
from torchrl_vla.files import check_output_folder, write_json
from torchrl_vla.versions import versions

__all__ = [
    "check_run_folder",
    "describe_run",
    "log_to",
    "open_run_folder",
    "refuse_changes",
]


def check_run_folder(config: TrainConfig | FinetuneConfig) -> None:
    """Refuse, before anything long is started, a folder that cannot be a new run's, or a run that cannot be resumed.

    Nothing is left behind.

    Args:
        config: the run; `run_dir` None becomes `runs/SUITE-DATE-TIME`.

    Raises:
        ValueError: the folder holds something already and the run is not a resumed one, a resumed one is given options
            that would change its policy or its data, or the folder cannot be written.
    """
    if config.run_dir is None:
        config.run_dir = Path("runs") / f"{config.ppo.task_suite}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = config.run_dir
    if config.resume:
        refuse_changes(type(config).load(folder / "config.json"), config)
    check_output_folder(folder, "--run-dir")
    if not config.resume and folder.is_dir() and any(folder.iterdir()):
        command = "train" if isinstance(config, TrainConfig) else "finetune"
        raise UserError(
            f"{folder} exists already. Choose another --run-dir, or resume the run in it: "
            f"torchrl-vla {command} --resume --run-dir {folder}"
        )


def open_run_folder(config: TrainConfig | FinetuneConfig) -> Path:
    """Make a new run's folder and note its options, or open the one to resume.

    Args:
        config: the run; `run_dir` None makes `runs/SUITE-DATE-TIME`.

    Raises:
        ValueError: as `check_run_folder` does.
    """
    check_run_folder(config)
    assert config.run_dir is not None
    if not config.resume:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        describe_run(config, config.run_dir)
    return config.run_dir


def refuse_changes(before: TrainConfig | FinetuneConfig, now: TrainConfig | FinetuneConfig) -> None:
    """Check that a run is resumed with its own options, but for those that change neither policy nor data.

    Args:
        before: options that the run has noted.
        now: options it is to be resumed with; those named in `allow_changed` may differ.

    Raises:
        ValueError: others differ.
    """
    old, new = _options(before), _options(now)
    unknown = sorted(set(now.allow_changed) - set(new))
    if unknown:
        raise UserError(f"allow_changed names no option: {', '.join(unknown)}.")
    changed = {
        name: f"{name} from {old[name]!r} to {value!r}"
        for name, value in new.items()
        if value != old[name] and name not in (now.MAY_CHANGE | set(now.allow_changed))
    }
    if changed:
        raise UserError(
            f"a resumed run keeps what makes its policy and its data, but {', '.join(changed.values())} would change: "
            f"leave it out, or say so with --allow-changed {' '.join(changed)}."
        )


def describe_run(config: TrainConfig | FinetuneConfig, folder: Path) -> None:
    """Note in a run's folder with which options, which command and which versions it runs, or goes on.

    A run that is resumed goes on with these options, and so it does when it is resumed once more; older notes stay
    beside the new ones.

    Args:
        config: the options.
        folder: of the run.
    """
    path = folder / "config.json"
    if path.exists() and _options(type(config).load(path)) == _options(config):
        return
    about = {"command": sys.argv, "started": time.strftime("%Y-%m-%d %H:%M:%S"), **versions()}
    _keep_old(folder / "about.json")
    write_json(folder / "about.json", about)
    _keep_old(path)
    dataclasses.replace(config, resume=False, allow_changed=[]).save(path)


def _options(config: TrainConfig | FinetuneConfig) -> dict[str, Any]:
    """All options by name, but how this run is started and where it lies, which may have been moved."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in ("resume", "run_dir", "allow_changed", "preset")}


def _keep_old(path: Path) -> None:
    """Copy a file that is about to be written anew, to `NAME-1.json`, or the next number that is free.

    Args:
        path: the file; nothing happens if there is none.
    """
    if not path.exists():
        return
    number = 1
    while (aside := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    shutil.copyfile(path, aside)  # a run without its notes could not be resumed: they stay until new ones are written


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
