"""A checkpoint may bring code along; none of it is run, and nobody is asked whether it may be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import torchrl_vla
from torchrl_vla.cli import main

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import PretrainedConfig as OpenVLAConfig, ProcessorMixin as PrismaticProcessor
from transformers import PreTrainedModel as OpenVLAForActionPrediction, PreTrainedTokenizerFast as PrismaticTokenizer
from transformers import BaseImageProcessor as PrismaticImageProcessor
NUM_ACTIONS_CHUNK = ACTIONS_CHUNK = 8
"""


def add(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


@pytest.fixture
def release(copy_release: Callable[[Path], Path], tmp_path: Path) -> Path:
    """Upstream's files name their classes for the configuration, the network, the processor and the tokenizer."""
    folder = copy_release(tmp_path / "release")
    for name in ("configuration_prismatic", "modeling_prismatic", "processing_prismatic", "tokenization_prismatic"):
        (folder / f"{name}.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    processor = {
        "AutoProcessor": "processing_prismatic.PrismaticProcessor",
        "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
    }
    add(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        },
    )
    add(folder / "preprocessor_config.json", auto_map=processor)
    add(folder / "processor_config.json", auto_map=processor)
    add(
        folder / "tokenizer_config.json",
        tokenizer_class="PrismaticTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_prismatic.PrismaticTokenizer"]},
    )
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("job", ["load", "doctor", "export"])
def test_a_checkpoints_code_never_runs(
    job: str, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    before = set(sys.modules)
    if job == "load":
        try:
            torchrl_vla.load_policy(release, trainable=False)
        except ValueError as error:  # a tokenizer that only its own code can read
            assert "No tokenizer can be loaded" in str(error)
    elif job == "doctor":
        with pytest.raises(SystemExit):
            main(["doctor", str(release), "--device", "cpu"])
    else:
        main(["export", str(release), str(tmp_path / "out")])
        assert (tmp_path / "out" / "modeling_prismatic.py").is_file()
    assert not asked and not (tmp_path / "ran").exists()
    assert not [name for name in set(sys.modules) - before if "prismatic" in name]
