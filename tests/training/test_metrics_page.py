"""docs/metrics.md names every figure of a run, and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from objectives.policy_table import random_batch, with_every_term
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from torchrl_vla.config import OpenVLAActorConfig, PPOConfig, TrainConfig
from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport
from torchrl_vla.objectives import GRPOAdvantage
from torchrl_vla.objectives.combining import combine
from torchrl_vla.objectives.sft import ActionL1Loss, TokenCrossEntropyLoss
from torchrl_vla.training import validation
from torchrl_vla.training.figures import group_figures, rollout_figures, update_figures
from torchrl_vla.training.health import RULES, Health
from torchrl_vla.training.logging import SilentLogger

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def _listed(heading: str) -> set[str]:
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return {name for row in re.findall(r"^\|(.*?)\|", section, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)}


def _rollout() -> set[str]:
    flag = torch.tensor([[True], [False], [False], [True]])
    result = {"done": torch.ones(4, 1, dtype=torch.bool), "reward": flag.float(), "success": flag}
    ids = {"task_id": torch.zeros(4, 1, dtype=torch.int64), "init_state_id": torch.tensor([[0], [0], [1], [1]])}
    batch = TensorDict({**ids, "episode": torch.arange(4)[:, None], "next": result}, [4])
    return {*rollout_figures(batch, 1.0), *group_figures(GRPOAdvantage().get_stats())}


def _update() -> set[str]:
    """Of a loss with every term it can have, in two micro-batches."""
    table, batch = random_batch()
    loss = with_every_term(table, "token")
    loss.set_normalizer(loss.count_valid(batch))
    step = {name: value.detach().float() for name, value in combine([loss(part) for part in batch.split(5)]).items()}
    step |= {"loss": torch.ones(()), "grad_norm": torch.ones(())}  # as OptimizerStep adds them
    return set(update_figures([step], decisions=9, epochs=1, episodes=1, kept=1, seconds=1.0))


def _validation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    report = EvaluationReport("libero_spatial", {3: "pick"}, [EpisodeResult(3, 0, True, 80, 10)], seconds=6.0)
    monkeypatch.setattr(validation, "evaluate", lambda *args, **kwargs: report)
    config = TrainConfig(ppo=PPOConfig(task_ids=[3], val_videos=False), actor=OpenVLAActorConfig())
    judge = validation.Validation(config, torch.nn.Module(), [], SilentLogger(folder))
    judge.actor.temperature = 1.0
    return {name.replace("task_3", "task_N") for name in judge(0)}


def test_every_figure_of_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = SilentLogger(tmp_path)
    logger.log(Health(tmp_path, 1).figures(), update=0, env_steps=0)
    written = {*logger.rows[0], *_rollout(), *_update(), *_validation(tmp_path, monkeypatch)}
    assert _listed("Of `train`") == written


def test_rules_read_figures_that_there_are() -> None:
    names = {name for rule in RULES for name in re.findall(r"{([a-z_]+/\w+)", rule.says)}
    assert names and names <= _listed("Of `train`")


def test_every_figure_of_fine_tuning_is_named() -> None:
    given = TensorDictModule(lambda x: x, in_keys=["x"], out_keys=["out"])
    tokens = TokenCrossEntropyLoss(given, bin_centers=torch.linspace(-1, 1, 5))
    tokens.set_keys(logits="out")
    regression = ActionL1Loss(given)
    regression.set_keys(prediction="out")
    action = {"tokens": torch.zeros(4, 2, 7, dtype=torch.int64), "chunk": torch.zeros(4, 2, 7)}
    terms = {
        name
        for loss, shape in ((tokens, (4, 2, 7, 5)), (regression, (4, 2, 7)))
        for name in loss(TensorDict({"x": torch.zeros(shape), "vla_action": action}, [4])).keys()
    }
    written = {f"train/{name}" for name in (*terms, "loss", "grad_norm", "learning_rate")} | {"time/steps_per_second"}
    assert _listed("Of `finetune`") == written | {f"val/{name.removeprefix('loss_')}" for name in terms}
