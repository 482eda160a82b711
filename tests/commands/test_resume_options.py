"""Options of `torchrl-vla finetune`, and where a resumed run takes those from that are not given."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrl_vla.commands.finetune import main
from torchrl_vla.config import FinetuneConfig


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneConfig]:
    """What would have run."""
    runs: list[FinetuneConfig] = []
    monkeypatch.setattr("torchrl_vla.recipes.finetune.finetune", runs.append)
    return runs


def test_a_resumed_run_keeps_its_options(runs: list[FinetuneConfig], tmp_path: Path) -> None:
    out = tmp_path / "run"
    main(
        [
            "--dataset",
            "demos",
            "--run-dir",
            str(out),
            "--steps",
            "1600",
            "--brightness",
            "0.1",
            "--num-images-in-input",
            "2",
        ]
    )
    out.mkdir()
    runs[0].save(out / "config.json")
    moved = out.rename(tmp_path / "moved")
    main(["--resume", "--run-dir", str(moved), "--actor-lr", "1e-4"])
    expected = {**vars(runs[0]), "run_dir": moved, "resume": True, "actor_lr": 1e-4}
    assert runs[0].steps == 1600 and runs[0].dataset == Path("demos") and vars(runs[1]) == expected


def test_resuming_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has no config.json. Leave out --resume to start one"):
        main(["--resume", "--run-dir", str(tmp_path), "--dataset", "demos"])
    (tmp_path / "config.json").write_text('{"ppo": {}}')
    with pytest.raises(ValueError, match="was not written by this version of `torchrl-vla finetune`"):
        main(["--resume", "--run-dir", str(tmp_path)])
