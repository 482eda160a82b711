"""A run goes on from its checkpoint as if it had never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrl.checkpoint import GlobalRNGState

from torchrl_vla.checkpoints.integrity import CHECKSUMS, write_checksums
from torchrl_vla.training.progress import RunProgress
from torchrl_vla.training.run_checkpoints import RunCheckpoints, TrainableState
from torchrl_vla.training.stopping import Stopped


class Run:
    """A small run: a frozen layer below a trainable one, an optimizer with state, random inputs."""

    def __init__(self, folder: Path, out_features: int = 2, keep: int = 1) -> None:
        torch.manual_seed(0)
        self.policy = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, out_features))
        self.optimizer = torch.optim.AdamW([p for p in self.policy.parameters() if p.requires_grad])
        self.checkpoints = RunCheckpoints(
            folder, keep=keep, policy=TrainableState(self.policy), optimizer=self.optimizer
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


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "cut": lambda path: largest(path).write_bytes(largest(path).read_bytes()[:-7]),
    "empty": lambda path: largest(path).write_bytes(b""),
    "zeros": lambda path: largest(path).write_bytes(bytes(largest(path).stat().st_size)),
    "one bit": lambda path: flip_a_byte(largest(path)),
    "gone": lambda path: largest(path).unlink(),
    "a folder in its place": lambda path: (largest(path).rename(path / "aside"), (path / "aside").rename(path / "x")),
    "manifest": lambda path: flip_a_byte(path / "manifest.json"),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "checksums": lambda path: flip_a_byte(path / CHECKSUMS),
    "no checksums": lambda path: (path / CHECKSUMS).unlink(),
    "checksums no text": lambda path: (path / CHECKSUMS).write_bytes(b"\xff\xfe"),
    "another file": lambda path: (path / "components" / "extra.bin").write_bytes(b"1"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture
):
    run = Run(tmp_path, keep=2)
    run.step()
    run.checkpoints.save(step=1, success=0.5)
    weights = run.policy[1].weight.clone()
    run.step()
    damaged = run.checkpoints.save(step=2, success=0.7)
    damage(damaged)
    other = Run(tmp_path, keep=2)
    assert other.checkpoints.load_latest() == tmp_path / "checkpoint-000000000001"
    assert torch.equal(other.policy[1].weight, weights)
    assert f"{damaged} is damaged and passed over" in capsys.readouterr().out


def test_where_all_are_damaged_nothing_is_loaded_or_touched(tmp_path: Path):
    run = Run(tmp_path, keep=2)
    for step in (1, 2):
        flip_a_byte(largest(run.checkpoints.save(step=step, success=None)))
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = Run(tmp_path)
    before = other.policy[1].weight.clone()
    with pytest.raises(ValueError, match="All checkpoints in .* are damaged"):
        other.checkpoints.load_latest()
    assert torch.equal(other.policy[1].weight, before)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content


def test_no_checkpoint_is_no_error(tmp_path: Path):
    assert Run(tmp_path / "none").checkpoints.load_latest() is None


def test_only_a_validated_checkpoint_can_be_the_best(tmp_path: Path):
    run = Run(tmp_path)
    for step, success in ((1, 0.9), (2, None), (3, 0.8), (4, None)):
        run.checkpoints.save(step=step, success=success)
    assert sorted(int(path.name[-3:]) for path in tmp_path.glob("checkpoint-*")) == [1, 4]


def test_what_a_kill_left_half_written_is_swept(tmp_path: Path):
    run = Run(tmp_path)
    for name in (".partial-checkpoint-000000000009", ".checkpoint-000000000009.stage-0a"):
        (tmp_path / name).mkdir()
    run.checkpoints.save(step=1, success=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000000001"]


class Counter:
    """A collector that counts its plans, and draws random numbers."""

    def __init__(self) -> None:
        self.plans = 0

    def collect(self) -> torch.Tensor:
        self.plans += 1
        return torch.rand(3)

    def state_dict(self) -> dict[str, int]:
        return {"plans": self.plans}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.plans = int(state["plans"])


@pytest.mark.parametrize("error", [Stopped(15), RuntimeError("a worker that crashes every time")], ids=repr)
def test_an_interrupted_rollout_begins_anew(tmp_path: Path, error: BaseException):
    def checkpoints(collector: Counter) -> RunCheckpoints:
        return RunCheckpoints(tmp_path, keep=1, collector=collector)

    torch.manual_seed(3)
    collector, said = Counter(), []
    expected = Counter().collect()
    torch.manual_seed(3)
    run = checkpoints(collector)
    with pytest.raises(type(error)), run.kept_at_the_end(RunProgress(updates=4, env_steps=40), said.append):
        with run.rollout("collector"):
            collector.collect()
            raise error
    assert "torchrl-vla train --resume --run-dir" in said[0] and "update 4" in said[0]
    torch.manual_seed(99)
    again = Counter()
    assert checkpoints(again).load_latest() is not None
    assert again.plans == 0 and torch.equal(again.collect(), expected)


def test_an_error_elsewhere_writes_nothing(tmp_path: Path):
    run = RunCheckpoints(tmp_path / "run", keep=1, collector=Counter())
    with pytest.raises(RuntimeError), run.kept_at_the_end(RunProgress(), print):
        with run.rollout("collector"):
            pass
        raise RuntimeError("diverged")
    assert not (tmp_path / "run").exists()


def test_without_room_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tensors are mapped into memory as they are written: a disk that fills up meanwhile would be a SIGBUS."""
    run = Run(tmp_path)
    run.step()
    first = run.checkpoints.save(step=1, success=None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ValueError, match=r"has room for 1 MB, and a checkpoint needs .* make room, then go on"):
        run.checkpoints.save(step=2, success=None)
    assert list(tmp_path.iterdir()) == [first] and Run(tmp_path).checkpoints.load_latest() == first
