"""A run goes on from its checkpoint as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchrl.checkpoint import GlobalRNGState

from torchrl_vla.checkpoints.integrity import write_checksums
from torchrl_vla.training.run_checkpoints import RunCheckpoints, TrainableState


class Run:
    """A small run: a frozen layer below a trainable one, an optimizer with state, random inputs."""

    def __init__(self, folder: Path, out_features: int = 2) -> None:
        torch.manual_seed(0)
        self.policy = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, out_features))
        self.optimizer = torch.optim.AdamW([p for p in self.policy.parameters() if p.requires_grad])
        self.checkpoints = RunCheckpoints(
            folder, keep=1, policy=TrainableState(self.policy), optimizer=self.optimizer
        )  # fmt: skip

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.policy(torch.randn(5, 3)).square().sum().backward()
        self.optimizer.step()


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path):
    run = Run(tmp_path)
    run.step()
    run.checkpoints.save(step=1, success=0.0)
    run.step()
    resumed = Run(tmp_path)
    resumed.step()
    resumed.step()
    resumed.checkpoints.load_latest()
    resumed.step()
    assert torch.equal(resumed.policy[1].weight, run.policy[1].weight)


def test_a_gpus_checkpoint_is_read_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Of a run on the second of two GPUs, as far as its files say; here there is none."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    run = Run(tmp_path)
    run.step()
    state = GlobalRNGState.state_dict
    two = [torch.get_rng_state(), torch.get_rng_state()]
    monkeypatch.setattr(GlobalRNGState, "state_dict", lambda self: state(self) | {"torch_cuda": two})
    path = run.checkpoints.save(step=1, success=0.0)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for file in path.glob("components/*/state.json"):
        file.write_text(file.read_text().replace('"cpu"', '"cuda:1"'))
    write_checksums(path)
    other = Run(tmp_path)
    other.checkpoints.load_latest()
    assert torch.equal(other.policy[1].weight, run.policy[1].weight) and other.policy[1].weight.device.type == "cpu"
    assert "The run had 2 GPUs and goes on with 0" in caplog.text


def test_frozen_parameters_are_not_written(tmp_path: Path):
    assert list(TrainableState(Run(tmp_path).policy).state_dict()) == ["1.weight", "1.bias"]


def test_newest_and_best_are_kept(tmp_path: Path):
    run = Run(tmp_path)
    for step, success in ((1, 0.9), (2, 0.1), (3, 0.2)):
        run.checkpoints.save(step=step, success=success)
    assert [path.name for path in run.checkpoints.rotation.checkpoints()] == [
        "checkpoint-000000000001",
        "checkpoint-000000000003",
    ]


def test_a_policy_of_another_shape_is_refused_unchanged(tmp_path: Path):
    Run(tmp_path).checkpoints.save(step=1, success=0.0)
    other = Run(tmp_path, out_features=5)
    before = other.policy[1].weight.clone()
    with pytest.raises(ValueError, match=r"1.weight is \(2, 4\) in the checkpoint, \(5, 4\) in this policy"):
        TrainableState(other.policy).load_state_dict(TrainableState(Run(tmp_path).policy).state_dict())
    assert torch.equal(other.policy[1].weight, before)


def test_nothing_to_resume(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        Run(tmp_path).checkpoints.load_latest()
