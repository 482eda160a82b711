"""A checkpoint folder is read once, whatever is done with it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import torchrl_vla
from torchrl_vla.checkpoints import openvla_format, shards
from torchrl_vla.cli import main

_opened: Counter[Path] | None = None
_hooked = False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, Path)):
        _opened[Path(arguments[0])] += 1


@contextmanager
def count_opens(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[Path]]:
    """How often each file is opened: by Python, and by safetensors, of which Python sees nothing."""
    global _opened, _hooked
    if not _hooked:
        sys.addaudithook(_note)  # stays for ever, and notes nothing outside of this block
        _hooked = True
    opened: Counter[Path] = Counter()
    for module in (shards, openvla_format):
        safe_open = module.safe_open

        def counted(path: Path, safe_open: Callable[..., Any] = safe_open, **options: Any) -> Any:
            opened[Path(path)] += 1
            return safe_open(path, **options)

        monkeypatch.setattr(module, "safe_open", counted)
    _opened = opened
    try:
        yield opened
    finally:
        _opened = None


@pytest.fixture(scope="module")
def release(copy_release: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_release(tmp_path_factory.mktemp("release") / "openvla")


SMALL = ("config.json", "dataset_statistics.json", "vit_overrides.json", "model.safetensors.index.json")
SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def load(release: Path, out: Path) -> None:
    torchrl_vla.load_policy(release, lora_rank=2, force=False, finetuned_on_discrete_actions=True)


def export(release: Path, out: Path) -> None:
    main(["export", str(release), str(out)])


def doctor(release: Path, out: Path) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", str(release), "--device", "cpu"])


@pytest.mark.processes
@pytest.mark.parametrize(("job", "reads"), [(load, 2), (export, 2), (doctor, 1)])
def test_a_folder_is_read_once(
    job: Callable[[Path, Path], None], reads: int, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards' headers once, and once more for the weights."""
    with count_opens(monkeypatch) as opened:
        job(release, tmp_path / "out")
    assert {name: opened[release / name] for name in SMALL} == dict.fromkeys(SMALL, 1)
    assert {name: opened[release / name] for name in SHARDS} == dict.fromkeys(SHARDS, reads)
