"""The choice of a micro-batch: what is measured decides."""

from __future__ import annotations

import pytest
import torch

from torchrl_vla.training import micro_batch
from torchrl_vla.training.micro_batch import MicroBatch, MicroBatchCost

GIB = 2**30


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    *,
    free: float,
    speed: dict[int, float],
    decisions: int = 96,
    margin: int = 0,
    more: dict[int, float] | None = None,
    **options: object,
) -> MicroBatch:
    """A choice on a GPU where a decision needs 1 GiB, or a tenth if recomputed at a third more time.

    Some sizes need more than that, in GiB, which the others do not show.
    """
    choice = MicroBatch(**{"size": "auto", "recompute": "auto", "set_recompute": lambda share: None, **options})

    def measure(_: object, __: object, size: int, share: float) -> MicroBatchCost:
        memory = size * (1 - 0.9 * share) + (more or {}).get(size, 0.0)
        return MicroBatchCost(size * speed[size] * (1 + share / 3), int(memory * GIB))

    monkeypatch.setattr(choice, "_measure", measure)
    for name, value in (
        ("mem_get_info", (free * GIB, 80 * GIB)), ("memory_reserved", 0), ("memory_allocated", 0),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(micro_batch, "_MARGIN", 0.0)
    monkeypatch.setattr(micro_batch, "_LEAST_MARGIN", margin)
    print(choice.choose(lambda size: None, torch.device("cuda"), decisions=decisions))
    return choice


def test_large_and_without_recomputation_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {32: 1.0, 24: 1.0, 16: 1.0, 12: 1.05, 8: 1.1, 4: 1.3, 2: 1.8, 1: 3.0}
    assert chosen(monkeypatch, free=40, speed=speed).size == 32
    choice = chosen(monkeypatch, free=20, speed=speed)
    assert (choice.size, choice.recompute) == (16, 0.0)  # 24 would have to recompute a quarter, 32 half
    assert choice.costs.keys() == {(32, 0.5), (24, 0.25), (16, 0.0), (12, 0.0), (8, 0.0), (4, 0.0), (2, 0.0)}


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


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    choice = chosen(monkeypatch, free=0.5, memory_gb=0.01, speed=dict.fromkeys((32, 24, 16, 12, 8, 4, 2, 1), 1.0))
    assert (choice.size, choice.recompute) == (1, 1.0)
    assert (
        "100% of the layers recomputed: there is nothing less, and it may take more than 0.0" in capsys.readouterr().out
    )


def test_a_size_must_fit_by_its_own_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """One decision alone takes half a GiB more than two, four and the line through them say."""
    speed = dict.fromkeys((4, 2, 1), 1.0)
    assert chosen(monkeypatch, free=1, speed=speed, size=1).costs.keys() == {(1, 0.0)}
    choice = chosen(monkeypatch, free=1, speed=speed, size=1, more={1: 0.5})
    assert choice.costs.keys() == {(1, 0.75)} and choice.recompute == 0.75  # 0.325 + 0.5; half is 0.55 + 0.5


def test_some_memory_is_left_for_fragmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = dict.fromkeys((32, 24, 16, 12, 8, 4, 2, 1), 1.0)
    assert chosen(monkeypatch, free=9, speed=speed, recompute=0.0).size == 8
    assert chosen(monkeypatch, free=9, speed=speed, recompute=0.0, margin=2 * GIB).size == 4


def test_a_cpu_is_not_measured() -> None:
    choice = MicroBatch("auto", "auto", set_recompute=lambda share: None)
    assert not choice.chosen
    assert choice.choose(lambda size: pytest.fail("ran"), torch.device("cpu")) == "Micro-batches of 32 decisions."
    assert choice.chosen and choice.recompute == 0.0


def test_the_time_of_a_whole_mini_batch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 decisions take two passes of up to 24, which 16 at a time do as well; 96 take four of 24."""
    speed = {32: 9.0, 24: 1.0, 16: 1.05, 12: 2.0, 8: 2.0, 4: 2.0, 2: 2.0, 1: 2.0}
    assert chosen(monkeypatch, free=40, speed=speed, decisions=32).size == 16
    assert chosen(monkeypatch, free=40, speed=speed, decisions=96).size == 24
    # A mini-batch of 3 would be one pass of 4; those to come will hardly be as small.
    assert chosen(monkeypatch, free=40, speed=speed, decisions=3).size == 16


@pytest.mark.parametrize(
    ("size", "decisions", "parts", "rows"),
    [(24, 32, 1, 16), (24, 96, 1, 24), (24, 49, 1, 18), (24, 49, 4, 13), (3, 7, 1, 3), (1, 5, 1, 1), (32, 5, 1, 5)],
)
def test_passes_of_a_mini_batch_are_of_one_size(size: int, decisions: int, parts: int, rows: int) -> None:
    assert MicroBatch(size).rows(decisions, parts) == rows


def test_what_a_pass_keeps_is_given_back_before_the_next_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size is measured alone: a recorded pass of the one before would take memory from it."""
    events: list[str] = []
    choice = MicroBatch("auto", set_recompute=lambda share: None)
    for name, value in (
        ("mem_get_info", (2**40, 2**40)), ("memory_reserved", 0), ("max_memory_reserved", GIB),
        ("reset_peak_memory_stats", None), ("synchronize", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    choice.choose(
        lambda size: events.append(f"run {size}"),
        torch.device("cuda"),
        decisions=32,
        release=lambda: events.append("release"),
    )
    assert events[:8] == ["run 2", "release", "release", "run 2", "run 2", "release", "run 4", "run 4"]
    assert events[-4:] == ["release", "run 2", "run 2", "release"]
