"""Each rule speaks in the run it is made for, once, and in no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrl_vla.training.health import RULES, Health
from torchrl_vla.training.logging import RunLogger

#: An update of a run that goes well, adapters included: few ratios are clipped.
GOOD = {
    "rollout/groups_kept": 4.0, "train/approx_kl": 0.002, "train/clipfrac": 0.01, "train/entropy": 0.9,
    "train/grad_norm": 0.2, "time/rollout_decisions_per_second": 30.0, "system/memory_gb": 3.0,
    "system/disk_free_gb": 50.0,
}  # fmt: skip
RUN = [GOOD | {"val/success_rate": 0.5}, *[GOOD] * 5]


def names(rows: list[dict[str, float]], episodes: int = 100) -> list[str]:
    """The rules that apply to the last row."""
    return [rule.name for rule in RULES if rule.applies(rows, episodes)]


@pytest.mark.parametrize(
    ("last", "name"),
    [
        ({"train/approx_kl": 0.051}, "KL"),
        ({"train/clipfrac": 0.31}, "clipped"),
        ({"train/entropy": 0.17}, "entropy collapse"),
        ({"train/entropy": 1.4}, "entropy rise"),
        # 50 of 100 at the start: the interval begins at 40.4%
        ({"val/success_rate": 0.40}, "worse than the start"),
        ({"train/grad_norm": 2.1}, "gradient"),
        ({"time/rollout_decisions_per_second": 14.0}, "slow workers"),
        ({"system/memory_gb": 5.6}, "memory"),
        ({"system/disk_free_gb": 1.9}, "disk"),
    ],
)
def test_a_rule_applies_from_its_bound_on(last: dict[str, float], name: str) -> None:
    assert names([*RUN, GOOD | last]) == [name]
    (said,) = Health(Path(), 100).warnings([*RUN, GOOD | last])
    assert "{" not in said
    assert Health(Path(), 100).warnings([*RUN, GOOD | last, GOOD | last]) == [], "said once"


def test_a_run_that_goes_well_hears_nothing() -> None:
    assert not any(names(RUN[: count + 1]) for count in range(len(RUN)))
    assert names([*RUN, GOOD | {"val/success_rate": 0.41}]) == []


def test_updates_without_anything_to_learn() -> None:
    """Such an update has no figures of training: other rules must not trip over that."""
    idle = {"rollout/groups_kept": 0.0}
    assert names([*RUN, idle, idle]) == []
    assert names([*RUN, idle, idle, idle]) == ["nothing to learn"]


def test_the_log_says_it_and_notes_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    logger = RunLogger(tmp_path, health=Health(tmp_path, 10))
    for update, kl in enumerate((0.01, 0.09), 1):
        logger.log({"train/approx_kl": kl}, update=update, env_steps=update)
    logger.close()
    assert capsys.readouterr().out.count("KL 0.090 in one update") == 1
    assert logger.rows[-1]["system/memory_gb"] > 0.01 and logger.rows[-1]["system/disk_free_gb"] > 0
