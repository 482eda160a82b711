"""Two policies on the same initial states: what the second one gained and lost, and whether that can be chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from torchrl_vla.errors import UserError
from torchrl_vla.evaluation.report import EvaluationReport, SuccessRate

__all__ = ["Comparison", "PairedOutcomes", "check_same_problem", "compare"]

#: Settings that make two episodes from the same initial state the same problem.
_SAME = ("sampled_init_states", "fixture_seed", "horizon", "fidelity")


@dataclass(frozen=True)
class PairedOutcomes:
    """What two policies made of the same episodes.

    Args:
        both: both succeeded.
        gained: only the new policy succeeded.
        lost: only the baseline succeeded.
        neither: both failed.

    Examples:
        >>> outcomes = PairedOutcomes(both=50, gained=9, lost=1, neither=40)
        >>> print(outcomes)
        +8.0 points [1.4, 14.3], gained 9, lost 1, McNemar p = 0.021
    """

    both: int
    gained: int
    lost: int
    neither: int

    @property
    def episodes(self) -> int:
        """Number of pairs."""
        return self.both + self.gained + self.lost + self.neither

    @property
    def baseline(self) -> SuccessRate:
        """Success of the baseline."""
        return SuccessRate(self.both + self.lost, self.episodes)

    @property
    def new(self) -> SuccessRate:
        """Success of the new policy."""
        return SuccessRate(self.both + self.gained, self.episodes)

    @property
    def difference(self) -> float:
        """New rate minus the baseline's."""
        return (self.gained - self.lost) / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the difference: Bonett and Price's adjusted Wald interval for paired proportions (2012)."""
        count = self.episodes + 2
        gained, lost = (self.gained + 1) / count, (self.lost + 1) / count
        centre = gained - lost
        half = NormalDist().inv_cdf(0.975) * math.sqrt((gained + lost - centre**2) / count)
        return max(-1.0, centre - half), min(1.0, centre + half)

    @property
    def p_value(self) -> float:
        """McNemar's exact test (1947), two-sided: were the pairs that differ coin tosses, how rare were this."""
        from scipy.stats import binomtest  # takes most of a second

        differing = self.gained + self.lost
        return float(binomtest(self.gained, differing).pvalue) if differing else 1.0

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{100 * self.difference:+.1f} points [{100 * low:.1f}, {100 * high:.1f}], gained {self.gained}, lost "
            f"{self.lost}, McNemar p = {self.p_value:.2g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return count and figures, for JSON."""
        return {
            "both": self.both,
            "gained": self.gained,
            "lost": self.lost,
            "neither": self.neither,
            "difference": self.difference,
            "interval": self.interval,
            "mcnemar_p": self.p_value,
        }


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two evaluations.

    Args:
        baseline_name: what the baseline is called, usually its checkpoint.
        new_name: likewise of the new policy.
        tasks: outcomes by task id.
        total: outcomes of all tasks.
        unpaired: episodes left out: only one of the two evaluations ran them, or they are greedy ones from a state that
            had been run before, nearly the same as the first.
    """

    baseline_name: str
    new_name: str
    tasks: dict[int, PairedOutcomes]
    total: PairedOutcomes
    unpaired: int

    def __str__(self) -> str:
        lines = [
            f"{self.new_name} against {self.baseline_name}, the same {self.total.episodes} initial states:",
            f"  {self.total.baseline} -> {self.total.new}: {self.total}",
        ]
        lines += [
            f"  task {task:>2}  {100 * outcome.baseline.rate:>5.1f}% -> {100 * outcome.new.rate:>5.1f}%   {outcome}"
            for task, outcome in self.tasks.items()
        ]
        if self.unpaired:
            lines.append(f"  {self.left_out}")
        return "\n".join(lines)

    @property
    def left_out(self) -> str:
        """A sentence on the unpaired episodes."""
        return (
            f"{self.unpaired} episodes are left out: only one of the two evaluations ran them, or greedily once more "
            "from the same initial state."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison for JSON."""
        return {
            "baseline": self.baseline_name,
            "new": self.new_name,
            "baseline_success": str(self.total.baseline),
            "new_success": str(self.total.new),
            **self.total.to_dict(),
            "unpaired_episodes": self.unpaired,
            "tasks": {task: outcome.to_dict() for task, outcome in self.tasks.items()},
        }


def compare(baseline: EvaluationReport, new: EvaluationReport) -> Comparison:
    """Compare two evaluations episode by episode.

    Episodes are paired by task and initial state, and in order where an initial state was run more than once with
    actions sampled anew. Greedy repeats are nearly the same episode, and the test takes pairs for independent: of them
    the first counts.

    Args:
        baseline: the evaluation to compare with.
        new: the evaluation to be judged.

    Raises:
        ValueError: they were not run on the same problems, or share no initial state.
    """
    check_same_problem(baseline, new.task_suite, new.settings)
    before, after = _by_start(baseline), _by_start(new)
    counts: dict[int, Counter[tuple[bool, bool]]] = {}
    for start in sorted(before.keys() & after.keys()):
        counts.setdefault(start[0], Counter())[before[start], after[start]] += 1
    if not counts:
        raise UserError("The evaluations share no initial state: there is nothing to compare.")
    return Comparison(
        str(baseline.settings.get("checkpoint", "baseline")),
        str(new.settings.get("checkpoint", "new")),
        {task: _outcomes(count) for task, count in counts.items()},
        _outcomes(sum(counts.values(), Counter())),
        len(baseline.episodes) + len(new.episodes) - 2 * len(before.keys() & after.keys()),
    )


def check_same_problem(baseline: EvaluationReport, task_suite: str, settings: Mapping[str, Any]) -> None:
    """Make sure that the same initial state means the same episode in two evaluations.

    Args:
        baseline: one evaluation.
        task_suite: the other's suite.
        settings: the other's settings.

    Raises:
        ValueError: it does not.
    """
    if baseline.task_suite != task_suite:
        raise UserError(
            f"The evaluations are of {baseline.task_suite} and {task_suite}: a paired comparison needs the same suite."
        )
    for name in _SAME:
        before, after = baseline.settings.get(name), settings.get(name)
        if before != after:
            raise UserError(
                f"The evaluations differ in {name} ({before!r} and {after!r}), so the same initial state is another "
                "episode in each: run one of them again with the other's options."
            )


def _by_start(report: EvaluationReport) -> dict[tuple[int, int, int], bool]:
    """Success by task, initial state and how often that one had been run before; once alone if greedily."""
    seen = Counter[tuple[int, int]]()
    outcomes = {}
    for episode in report.episodes:
        start = (episode.task_id, episode.init_state_id)
        if not (seen[start] and report.settings.get("greedy")):
            outcomes[*start, seen[start]] = episode.success
        seen[start] += 1
    return outcomes


def _outcomes(counts: Counter[tuple[bool, bool]]) -> PairedOutcomes:
    return PairedOutcomes(counts[True, True], counts[False, True], counts[True, False], counts[False, False])
