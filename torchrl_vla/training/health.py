"""Rules that read a run's figures and say in a line what goes wrong, why it probably does, and what to change."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torchrl_vla.evaluation.report import SuccessRate

__all__ = ["Health", "RULES", "Rule"]

Rows = Sequence[Mapping[str, float]]

#: Updates that a comparison with earlier ones looks back on, and those without anything to learn before it is said.
_WINDOW, _IDLE = 10, 3
_SPEED = "time/rollout_decisions_per_second"


class Rule(NamedTuple):
    """One thing that can go wrong.

    Args:
        name: for tests and logs.
        applies: given the rows of ``metrics.csv`` up to an update, and the number of episodes of a validation, whether
            it has gone wrong there.
        says: what is said then, with the newest row's figures filled in.
    """

    name: str
    applies: Callable[[Rows, int], bool]
    says: str


def _series(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]


def _newest(rows: Rows, name: str) -> float:
    """Figure of the newest row; NaN where it has none, which no comparison takes for large or small."""
    return rows[-1].get(name, math.nan)


def _before(rows: Rows, name: str) -> float:
    """Median of the updates before the newest one; NaN before there are enough of them."""
    values = _series(rows[:-1], name)[-_WINDOW:]
    return statistics.median(values) if len(values) >= 3 else math.nan


def _nothing_to_learn(rows: Rows, _: int) -> bool:
    kept = [row["rollout/groups_kept"] for row in rows if "rollout/groups_kept" in row]
    return len(kept) >= _IDLE and not any(kept[-_IDLE:])


def _first(rows: Rows, name: str) -> float:
    return next(iter(_series(rows, name)), math.nan)


def _below_start(rows: Rows, episodes: int) -> bool:
    start = _first(rows, "val/success_rate")
    if math.isnan(start) or "val/success_rate" not in rows[-1]:
        return False
    return rows[-1]["val/success_rate"] < SuccessRate(round(start * episodes), episodes).interval[0]


#: Never a low clip fraction by itself: adapters learned well with 1 to 2% of the ratios clipped.
RULES = (
    Rule(
        "nothing to learn",
        _nothing_to_learn,
        f"the last {_IDLE} updates had no group with both outcomes, so nothing was learned. If all fail, choose easier "
        "tasks or a lower --rollout-temperature; if all succeed, harder ones; a larger --group-size helps in both.",
    ),
    Rule(
        "KL",
        lambda rows, _: _newest(rows, "train/approx_kl") > 0.05,
        "KL {train/approx_kl:.3f} in one update, above 0.05: the policy moves too fast. Lower --actor-lr or "
        "--n-epochs.",
    ),
    Rule(
        "clipped",
        lambda rows, _: _newest(rows, "train/clipfrac") > 0.3,
        "{train/clipfrac:.0%} of the ratios are clipped, above 30%: most of the later steps of an update are lost. "
        "Lower --actor-lr or --n-epochs.",
    ),
    Rule(
        "entropy collapse",
        lambda rows, _: _newest(rows, "train/entropy") < 0.2 * _first(rows, "train/entropy"),
        "entropy {train/entropy:.3f} is below a fifth of the first update's: rollouts hardly differ any more, and "
        "groups with both outcomes get rare. Raise --rollout-temperature, or stop here if success is high.",
    ),
    Rule(
        "entropy rise",
        lambda rows, _: _newest(rows, "train/entropy") > 1.5 * _first(rows, "train/entropy"),
        "entropy {train/entropy:.3f} is half as much again as the first update's: actions get random. Set "
        "--entropy-coef 0, or lower --actor-lr.",
    ),
    Rule(
        "worse than the start",
        _below_start,
        "validation success {val/success_rate:.1%} is below the 95% interval of the start's: training harms. Lower "
        "--actor-lr, or go back to the best checkpoint.",
    ),
    Rule(
        "gradient",
        lambda rows, _: _newest(rows, "train/grad_norm") > 10 * _before(rows, "train/grad_norm"),
        "gradient norm {train/grad_norm:.2f}, ten times that of the updates before: look for what changed in the data, "
        "or lower --actor-lr.",
    ),
    Rule(
        "slow workers",
        lambda rows, _: (
            _newest(rows, "time/rollout_decisions_per_second")
            < 0.5 * _before(rows, "time/rollout_decisions_per_second")
        ),
        "{time/rollout_decisions_per_second:.1f} decisions per second, less than half of before: other work on this "
        "machine, or workers that are replaced again and again (train.log names them).",
    ),
    Rule(
        "memory",
        lambda rows, _: _newest(rows, "system/memory_gb") > 1.5 * _before(rows, "system/memory_gb") + 1.0,
        "this process holds {system/memory_gb:.1f} GB, half as much again as before: lower --num-envs or --n-steps if "
        "it goes on rising.",
    ),
    Rule(
        "disk",
        lambda rows, _: _newest(rows, "system/disk_free_gb") < 2.0,
        "{system/disk_free_gb:.1f} GB are free where the run writes: make room, or the next checkpoint fails.",
    ),
)


class Health:
    """Watches a run: adds figures of the machine to each row, and says when a rule begins to apply.

    Args:
        folder: of the run.
        val_episodes: episodes of a validation.

    Examples:
        >>> rows = [{"train/approx_kl": 0.01}, {"train/approx_kl": 0.08}]
        >>> Health(Path("."), 10).warnings(rows)
        ['KL 0.080 in one update, above 0.05: the policy moves too fast. Lower --actor-lr or --n-epochs.']
    """

    def __init__(self, folder: Path, val_episodes: int) -> None:
        self.folder, self.val_episodes = folder, max(val_episodes, 1)

    def figures(self) -> dict[str, float]:
        """Memory of this process and free disk, in GB."""
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
        free = shutil.disk_usage(self.folder).free
        return {"system/memory_gb": pages * 4096 / 1e9, "system/disk_free_gb": free / 1e9}

    def warnings(self, rows: Rows) -> list[str]:
        """Return what rules apply to the newest row that did not apply to the one before.

        Args:
            rows: of ``metrics.csv`` so far, oldest first.
        """
        return [
            rule.says.format_map(rows[-1])
            for rule in RULES
            if rule.applies(rows, self.val_episodes)
            and not (len(rows) > 1 and rule.applies(rows[:-1], self.val_episodes))
        ]
