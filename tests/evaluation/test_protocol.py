"""The protocol: parts make one report, and what is done is kept on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.envs.utils import ExplorationType, exploration_type

from torchrl_vla.collectors import EpisodePlan, Progress
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.evaluation import protocol
from torchrl_vla.evaluation.report import EvaluationReport
from torchrl_vla.modules.distributions import seeded_uniforms


def act(tensordict: TensorDictBase) -> TensorDictBase:
    """The right answer for even initial states, the worst one for the others."""
    target = tensordict["observation", "state"][..., 2:4]
    good = (tensordict["init_state_id"] % 2 == 0).float()
    return tensordict.set("action", (target * (2 * good - 1)).unsqueeze(-2).expand(-1, 4, -1).clamp(-1, 1))


def test_parts_make_the_report_that_one_collection_makes(monkeypatch: pytest.MonkeyPatch):
    plan = EpisodePlan.grid([0], range(50))
    options = {"task_suite": "toy", "instructions": {0: "track"}}
    torch.manual_seed(0)
    whole = protocol.evaluate(ToyTrackingEnv(2), act, plan, **options)
    monkeypatch.setattr(protocol, "_PART", 15)
    kept: list[EvaluationReport] = []
    seen: list[Progress] = []
    torch.manual_seed(0)
    report = protocol.evaluate(ToyTrackingEnv(2), act, plan, save=kept.append, progress=seen.append, **options)
    assert report.episodes == whole.episodes and 0 < report.total.successes < 50
    assert [len(action) for action in report.actions] == [episode.control_steps for episode in report.episodes]
    # Twenty at a time, ten of each of two environments; the last ones are in the report that is returned.
    assert [len(part.episodes) for part in kept] == [20, 40]
    assert kept[0].episodes == whole.episodes[:20]
    assert {progress.planned_episodes for progress in seen} == {50}
    counted = [(progress.decisions, progress.episodes, progress.successes) for progress in seen]
    assert counted == sorted(counted)
    assert counted[-1] == (sum(episode.decisions for episode in report.episodes), 50, report.total.successes)


def test_sampled_episodes_do_not_depend_on_environments_or_parts(monkeypatch: pytest.MonkeyPatch):
    def guess(tensordict: TensorDictBase) -> TensorDictBase:
        noise = seeded_uniforms(tensordict["decision_seed"], 8).view(-1, 4, 2) - 0.5
        target = tensordict["observation", "state"][..., 2:4]
        return tensordict.set("action", (target.unsqueeze(-2) + 1.4 * noise).clamp(-1, 1))

    options = {"task_suite": "toy", "instructions": {0: "track"}, "greedy": False}
    reports = []
    for slots, part in ((2, 100), (1, 15), (7, 15)):
        monkeypatch.setattr(protocol, "_PART", part)
        torch.manual_seed(0)
        plan = EpisodePlan.grid([0], range(50))
        reports.append(protocol.evaluate(ToyTrackingEnv(slots), guess, plan, **options))
    assert 0 < reports[0].total.successes < 50
    for report in reports[1:]:
        assert report.episodes == reports[0].episodes


@pytest.mark.parametrize("slots", [1, 3])
def test_an_evaluation_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, slots: int):
    def guess(tensordict: TensorDictBase) -> TensorDictBase:
        noise = seeded_uniforms(tensordict["decision_seed"], 8).view(-1, 4, 2) - 0.5
        target = tensordict["observation", "state"][..., 2:4]
        return tensordict.set("action", (target.unsqueeze(-2) + 1.4 * noise).clamp(-1, 1))

    # Three runs of each state, with actions sampled anew.
    plan = protocol.spread_episodes([0], {0: list(range(5))}, 15, repeat=True)
    options = {"task_suite": "toy", "instructions": {0: "track"}, "greedy": False}
    torch.manual_seed(0)
    whole = protocol.evaluate(ToyTrackingEnv(slots), guess, plan, **options)
    asked = iter([False] * (40 // slots))
    torch.manual_seed(0)
    part = protocol.evaluate(ToyTrackingEnv(slots), guess, plan, stop=lambda: next(asked, True), **options)
    assert 0 < len(part.episodes) < 15
    part.save_part(tmp_path)
    done, seen = EvaluationReport.load_part(tmp_path), []
    torch.manual_seed(0)
    resumed = protocol.evaluate(ToyTrackingEnv(slots), guess, plan, done=done, progress=seen.append, **options)
    assert resumed.episodes == whole.episodes and 0 < whole.total.successes < 15
    for actions, expected in zip(resumed.actions, whole.actions, strict=True):
        assert (actions == expected).all()
    assert seen[0].episodes >= len(part.episodes) and seen[-1].episodes == 15
    assert resumed.seconds > part.seconds


def test_a_stop_before_the_first_episode_ends_leaves_nothing() -> None:
    plan = EpisodePlan.grid([0], range(3))
    report = protocol.evaluate(
        ToyTrackingEnv(2), act, plan, task_suite="toy", instructions={0: "track"}, stop=lambda: True
    )
    assert report.episodes == report.actions == []


def test_what_is_not_planned_is_not_gone_on_with() -> None:
    options = {"task_suite": "toy", "instructions": {0: "track"}}
    done = protocol.evaluate(ToyTrackingEnv(2), act, EpisodePlan.grid([0], range(3)), **options)
    with pytest.raises(ValueError, match="has an episode of task 0 from initial state 2 that is not planned"):
        protocol.evaluate(ToyTrackingEnv(2), act, EpisodePlan.grid([0], range(2)), done=done, **options)


@pytest.mark.parametrize(("greedy", "mode"), [(True, ExplorationType.DETERMINISTIC), (False, ExplorationType.RANDOM)])
def test_the_policy_acts_greedily_or_samples_as_asked(greedy: bool, mode: ExplorationType):
    seen: set[ExplorationType | None] = set()

    def watched(tensordict: TensorDictBase) -> TensorDictBase:
        seen.add(exploration_type())
        return act(tensordict)

    plan = EpisodePlan.grid([0], range(3))
    report = protocol.evaluate(
        ToyTrackingEnv(2), watched, plan, task_suite="toy", instructions={0: "track"}, greedy=greedy
    )
    assert seen == {mode} and report.settings["greedy"] is greedy
