from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchrl_vla.bench import checkpoint_phases
from torchrl_vla.bench.checkpoint_loading import CheckpointBench


def test_phases_on_the_tiny_model(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    saved = checkpoint_phases.save("tiny", "cpu", folder)
    assert saved["shards"] == 1 and saved["largest_shard"] < saved["bytes"]
    loaded = checkpoint_phases.load("tiny", "cpu", folder)
    assert loaded["equal"] == loaded["parameters"] > 150
    assert loaded["weights"] > 2 * 7e6
    head = next((tmp_path / "checkpoint").glob("proprio*"))
    state = torch.load(head, weights_only=True)
    state["module.fc1.bias"] += 1
    torch.save(state, head)
    assert checkpoint_phases.load("tiny", "cpu", folder)["equal"] == loaded["parameters"] - 1
    assert "needs a CUDA device" in checkpoint_phases.load_4bit("cpu", folder)


def test_bad_options(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        CheckpointBench(folder=tmp_path)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        CheckpointBench(batch_size=0)
    with pytest.raises(ValueError, match="the 7B model is measured on a GPU"):
        CheckpointBench(device="cpu").run()
