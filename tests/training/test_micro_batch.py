"""The choice of a micro-batch: what is measured decides."""

from __future__ import annotations

import pytest
import torch

from torchrl_vla.training import micro_batch
from torchrl_vla.training.micro_batch import MicroBatch, MicroBatchCost

GIB = 2**30


def chosen(monkeypatch: pytest.MonkeyPatch, *, free: float, speed: dict[int, float], **options: object) -> MicroBatch:
    """A choice on a GPU where a decision needs 1 GiB, or a tenth if recomputed at a third more time."""
    choice = MicroBatch(**{"size": "auto", "recompute": "auto", "set_recompute": lambda share: None, **options})

    def measure(_: object, __: object, size: int, share: float) -> MicroBatchCost:
        return MicroBatchCost(size * speed[size] * (1 + share / 3), int(size * (1 - 0.9 * share) * GIB))

    monkeypatch.setattr(choice, "_measure", measure)
    for name, value in (
        ("mem_get_info", (free * GIB, 80 * GIB)), ("memory_reserved", 0), ("memory_allocated", 0),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(micro_batch, "_MARGIN", 0.0)
    choice.choose(lambda size: None, torch.device("cuda"))
    return choice


def test_large_and_without_recomputation_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {32: 1.0, 24: 1.0, 16: 1.0, 12: 1.05, 8: 1.1, 4: 1.3, 2: 1.8, 1: 3.0}
    assert chosen(monkeypatch, free=40, speed=speed).size == 32
    choice = chosen(monkeypatch, free=20, speed=speed)
    assert (choice.size, choice.recompute) == (16, 0.0)  # 24 would have to recompute a quarter, 32 half
    assert choice.costs.keys() == {(32, 0.5), (24, 0.25), (16, 0.0), (12, 0.0), (8, 0.0), (4, 0.0), (2, 0.0), (1, 0.0)}


def test_recomputes_where_small_micro_batches_are_slower_still(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {32: 1.0, 24: 1.0, 16: 1.0, 12: 1.1, 8: 1.0, 4: 2.0, 2: 4.0, 1: 8.0}
    choice = chosen(monkeypatch, free=4, speed=speed)
    assert (choice.size, choice.recompute) == (8, 0.75)  # 8 x (1 - 0.9 x 0.75) = 2.6 GiB; a quarter less is 4.4


def test_what_is_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = dict.fromkeys((32, 24, 16, 12, 8, 4, 2, 1), 1.0)
    choice = chosen(monkeypatch, free=4, speed=speed, size=8)
    assert (choice.size, choice.recompute) == (8, 0.75)
    choice = chosen(monkeypatch, free=9, speed=speed, memory_gb=2.0, recompute=0.0)
    assert (choice.size, choice.recompute) == (2, 0.0)
    assert MicroBatch(8, 0.5).chosen


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, free=0.01, speed=dict.fromkeys((32, 24, 16, 12, 8, 4, 2, 1), 1.0))
    assert (choice.size, choice.recompute) == (1, 1.0)


def test_a_cpu_is_not_measured() -> None:
    choice = MicroBatch("auto", "auto", set_recompute=lambda share: None)
    assert not choice.chosen
    assert choice.choose(lambda size: pytest.fail("ran"), torch.device("cpu")) == "Micro-batches of 32 decisions."
    assert choice.chosen and choice.recompute == 0.0
