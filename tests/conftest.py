"""What tests of several folders start from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Simulating processes share the cores: one thread each. Here, before torch is imported, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def copy_release() -> Callable[[Path], Path]:
    """Copies upstream's tiny checkpoint, with L1 head, proprio projector and tokenizer, to a folder and returns it."""

    def copy(folder: Path) -> Path:
        shutil.copytree(DATA / "openvla" / "checkpoint", folder, copy_function=shutil.copyfile)
        for file in (DATA / "llama_tokenizer").iterdir():
            shutil.copyfile(file, folder / file.name)
        return folder

    return copy


@pytest.fixture
def model() -> object:
    from small_openvla import random_model

    return random_model()


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Upstream's tiny checkpoint."""
    return DATA / "openvla" / "checkpoint"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Upstream's inputs, intermediates and outputs by file."""
    from safetensors.torch import load_file

    return lambda name: load_file(DATA / "openvla" / f"{name}.safetensors")
