"""What a user types: the training script under torchrun, on real LIBERO, beside the same run in one process."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.simulator, pytest.mark.processes]

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
#: GAE learns from failures too, so that an untrained policy's updates are not empty.
OPTIONS = [
    "--preset", "tiny", "--pretrained-checkpoint", "random:tiny", "--device", "cpu", "--advantage-estimator", "gae",
    "--group-size", "3", "--max-episode-steps", "16", "--n-steps", "40", "--timesteps", "60", "--camera-size", "64",
    "--settle-steps", "1", "--fidelity", "fast", "--n-epochs", "1", "--val-interval", "40", "--val-episodes", "3",
    "--no-val-videos", "--num-envs", "1",
]  # fmt: skip


def run(folder: Path, *launcher: str) -> list[dict[str, float]]:
    command = [sys.executable, *launcher, str(SCRIPT), *OPTIONS, "--run-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


def test_two_processes_make_the_run_of_one(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone")
    together = run(tmp_path / "together", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert [row["env_steps"] for row in together] == [row["env_steps"] for row in alone] and len(alone) == 3
    assert together[-1]["rollout/num_trajectories"] == alone[-1]["rollout/num_trajectories"] == 3
    for row, expected in zip(together, alone, strict=True):
        for name in expected:
            if name.startswith(("train/", "rollout/", "val/")) and "time" not in name and "seconds" not in name:
                assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    assert (tmp_path / "together" / "policy" / "model.safetensors").is_file()
