"""A policy folder is compared with its checksums before it is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrl_vla.checkpoints.policy import build_policy, load_policy, save_policy
from torchrl_vla.cli import main

FILES = ["model.safetensors", "config.json", "dataset_statistics.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(build_policy("tiny"), tmp_path / "policy")
    return tmp_path / "policy"


def damage(path: Path) -> None:
    """Change a byte in the middle, and leave the size as it is."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_told_and_names_the_file(folder: Path, name: str) -> None:
    load_policy(str(folder), trainable=False)
    damage(folder / name)
    with pytest.raises(ValueError, match=f"policy is damaged: {name} has other bytes than were written"):
        load_policy(str(folder), trainable=False)


def test_files_that_users_add_are_none_of_its_business(folder: Path) -> None:
    (folder / "README.md").write_text("# My policy")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    load_policy(str(folder), trainable=False)


@pytest.mark.processes
@pytest.mark.parametrize("command", ["train", "evaluate", "export", "doctor"])
def test_every_command_refuses_it(folder: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture) -> None:
    damage(folder / "model.safetensors")
    options = {
        "train": ["--checkpoint", str(folder), "--run-dir", str(tmp_path / "out"), "--device", "cpu"],
        "evaluate": ["--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--num-envs", "1"],
        "export": [str(folder), str(tmp_path / "out")],
        "doctor": [str(folder), "--device", "cpu"],
    }[command]
    with pytest.raises(SystemExit) as ended:
        main([command, *options])
    said = f"{ended.value.code} {capsys.readouterr().err}"
    assert "model.safetensors has other bytes than were written" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
