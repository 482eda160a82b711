"""How often an evaluation loads the compiled models of a suite that has one per task."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase

from torchrl_vla.collectors import EpisodePlan
from torchrl_vla.config import EvaluateConfig
from torchrl_vla.envs import LiberoEnv
from torchrl_vla.envs.simulation.simulator import LiberoSimulator
from torchrl_vla.evaluation.protocol import evaluate
from torchrl_vla.evaluation.report import EvaluationReport
from torchrl_vla.recipes.evaluate import _acting, _plan

SUITE, WORKERS, SLOTS, KEPT = "libero_object", 2, 4, 5


class Stub(LiberoSimulator):
    """Keeps and forgets models as the real one does, but they are empty. How an episode goes follows from its start."""

    loads: list[int]

    def _task(self, task_id: int) -> SimpleNamespace:  # type: ignore[override]
        if task_id not in self._tasks:
            self.loads.append(task_id)
            self._tasks[task_id] = SimpleNamespace(compiled=object())  # type: ignore[assignment]
        return self._tasks[task_id]  # type: ignore[return-value]

    def reset(self, slot: int, task_id: int, init_state_id: int) -> None:
        task = self._task(task_id)
        left, outcome = np.random.default_rng([task_id, init_state_id]).integers([1, 0], [5, 2]).tolist()
        self._slots[slot] = SimpleNamespace(task=task, left=left, success=outcome == 1)  # type: ignore[call-overload]
        self._forget_models(task.compiled)

    def step(self, slot: int, actions: np.ndarray) -> tuple[int, bool]:
        held = self._slots[slot]
        held.left -= 1  # type: ignore[union-attr]
        return len(actions), held.left == 0 and held.success  # type: ignore[union-attr]

    def low_dim(self, slot: int) -> dict[str, np.ndarray]:
        sizes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
        return {name: np.zeros(size) for name, size in sizes.items()}

    def render(self, slot: int, camera: str) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)


def stand_still(tensordict: TensorDictBase) -> TensorDictBase:
    return tensordict.set("action", torch.zeros(*tensordict.batch_size, 8, 7))


def run(plan: EpisodePlan, monkeypatch: pytest.MonkeyPatch) -> tuple[EvaluationReport, int]:
    """The report, and how often a model was loaded, where each of two workers keeps half of the models."""
    monkeypatch.setattr(Stub, "loads", [], raising=False)
    monkeypatch.setattr("torchrl_vla.envs.simulation.simulator.LiberoSimulator", Stub)
    options = {"num_envs": SLOTS, "image_size": 8, "max_episode_steps": 40, "max_models": KEPT}
    envs = [LiberoEnv(SUITE, task_ids=range(10), include_instruction=False, **options) for _ in range(WORKERS)]
    report = evaluate(envs, stand_still, plan, task_suite=SUITE, instructions={})
    return report, len(Stub.loads)


@pytest.mark.processes
def test_each_worker_loads_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvaluateConfig("bundled:tiny", task_suite=SUITE, episodes_per_task=20)
    plan = _plan(config, _acting(config, config.pretrained_checkpoint))
    report, loads = run(plan, monkeypatch)
    assert loads == 10 * WORKERS
    # In turns, as suites of one model are run, the same episodes come out, after many more loads.
    in_turns = EpisodePlan(sorted(((e.task_id, e.init_state_id) for e in plan), key=lambda start: start[1]))
    expected, loads = run(in_turns, monkeypatch)
    assert loads > 80
    assert sorted(report.episodes, key=str) == sorted(expected.episodes, key=str)
    assert 0 < report.total.successes < len(plan) == 200


def test_suites_of_one_model_are_run_in_turns() -> None:
    """So that what is kept of an evaluation on its way says something about every task."""
    config = EvaluateConfig("bundled:tiny", task_suite="libero_goal", task_ids=[4, 2], episodes_per_task=2)
    assert [episode.task_id for episode in _plan(config, _acting(config, config.pretrained_checkpoint))] == [4, 2, 4, 2]
