"""The loop: what it learns from, and when it validates, saves, pushes weights, skips and stops."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from token_policy import K, make_actor, make_batch, weights
from torchrl.collectors import MultiSyncCollector
from torchrl.envs.transforms import Transform
from torchrl.objectives.value import GAE
from torchrl.weight_update import MultiProcessWeightSyncScheme

from torchrl_vla.config import PPOConfig
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.objectives import AsymmetricClipPPOLoss, EstimateAdvantage, GRPOAdvantage
from torchrl_vla.recipes.grpo import learn, make_buffer, update
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.optimizer_step import OptimizerStep
from torchrl_vla.training.progress import RunProgress

#: Control steps of a batch: six episodes of two decisions of K.
BATCH = 12 * K


class Run:
    """What `learn` needs, small; the batches are the same one again and again unless given."""

    def __init__(
        self,
        folder: Path,
        batches: Iterable[TensorDictBase] | None = None,
        *,
        advantage: Transform | None = None,
        **values: Any,
    ) -> None:
        self.actor = make_actor()
        self.batch = make_batch(self.actor)
        self.batches = self._repeat() if batches is None else batches
        defaults = {
            "n_epochs": 2,
            "batch_size": 100,
            "traj_split_num": 1,
            "val_interval": 0,
            "save_interval": 10**9,
            "log_interval": 10**9,
        }
        self.config = PPOConfig(**defaults | values)
        self.advantage = GRPOAdvantage() if advantage is None else advantage
        self.buffer = make_buffer(self.advantage)
        self.step = OptimizerStep(
            AsymmetricClipPPOLoss(self.actor), torch.optim.SGD(self.actor.parameters(), lr=1e-2), self.config
        )
        self.progress, self.logger = RunProgress(), RunLogger(folder)
        self.events: list[tuple[str, int]] = []
        self.saved: list[float | None] = []

    def _repeat(self) -> Iterator[TensorDictBase]:
        while True:
            yield self.batch.clone()

    def learn(self, **options: Any) -> None:
        learn(
            self.config, self.batches, self.buffer, self.step, self.progress, self.logger,
            **{"advantage": self.advantage} | options,
        )  # fmt: skip

    def update(self, batch: TensorDictBase) -> dict[str, float]:
        return update(self.config, batch, self.buffer, self.step, self.advantage)

    def validate(self, env_steps: int, success: float = 0.5) -> Mapping[str, float]:
        assert env_steps == self.progress.env_steps
        self.events.append(("validate", env_steps))
        return {"val/success_rate": success}

    @contextmanager
    def rollout(self, *names: str) -> Iterator[None]:
        """As checkpoints have it, around the collection of a batch."""
        assert names == ("collector",)
        yield

    def save(self, *, step: int, success: float | None) -> None:
        """As checkpoints have it."""
        self.events.append(("save", step))
        self.saved.append(success)

    def minibatches(self, batch: TensorDictBase) -> list[TensorDictBase]:
        """What the loss is given in one update."""
        seen: list[TensorDictBase] = []
        hook = self.step.loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        self.update(batch)
        hook.remove()
        return seen


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    return partial(Run, tmp_path)


def gae() -> EstimateAdvantage:
    return EstimateAdvantage(GAE(gamma=0.9, lmbda=0.9, value_network=None))


def with_values(batch: TensorDictBase) -> TensorDictBase:
    batch["state_value"] = torch.zeros(*batch.shape, 1)
    batch["next", "state_value"] = torch.zeros(*batch.shape, 1)
    batch["next", "terminated"] = batch["next", "done"].clone()
    return batch


@pytest.mark.parametrize("advantage", [GRPOAdvantage, gae])
def test_a_batch_is_freed_before_the_next_is_collected(make_run, advantage) -> None:
    """Neither the loop nor the buffer keeps its images: two batches of them need not fit in memory."""
    freed = []

    def batches() -> Iterator[TensorDictBase]:
        while True:
            batch = with_values(make_batch(make_actor()))
            state = weakref.ref(batch["observation", "state"].untyped_storage())
            yield batch
            del batch
            freed.append(state() is None and not len(run.buffer))

    run = make_run(batches(), advantage=advantage(), total_timesteps=3 * BATCH)
    run.learn()
    assert run.progress.updates == 3 and freed == [True, True]


@pytest.mark.parametrize(("trajectories", "steps_per_epoch"), [(1, 6), (2, 3), (4, 2), (100, 1)])
def test_a_mini_batch_has_so_many_trajectories_worth_of_decisions(
    make_run, trajectories: int, steps_per_epoch: int
) -> None:
    """Six trajectories of two decisions."""
    run = make_run(traj_mini_batch_size=trajectories)
    metrics = run.update(run.batch)
    assert metrics["train/optimizer_steps"] == run.step.optimizer_steps == 2 * steps_per_epoch
    assert (metrics["train/episodes"], metrics["train/dropped_episodes"], metrics["train/decisions"]) == (6, 0, 12)


@pytest.mark.parametrize(
    ("episodes", "trajectories", "sizes"), [(13, 3, [6, 5, 5, 5, 5]), (6, 4, [6, 6]), (7, 100, [14]), (3, 1, [2, 2, 2])]
)
def test_mini_batches_of_an_epoch_differ_by_at_most_one(
    make_run, episodes: int, trajectories: int, sizes: list[int]
) -> None:
    """Each is a step of the same length: the last one must not be a handful of decisions."""
    run = make_run(traj_mini_batch_size=trajectories)
    batch = make_batch(run.actor, outcomes=((1, *[0] * (episodes - 1)),))
    run.advantage.keep_low = 0.0
    assert [len(part) for part in run.minibatches(batch)] == 2 * sizes


def test_fewer_decisions_than_mini_batches_are_one_each(make_run) -> None:
    """A transform may keep less than one decision of each episode."""

    class KeepTwo(Transform):
        def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
            return any_advantage(tensordict[:2])

    run = make_run(advantage=KeepTwo(), traj_mini_batch_size=1)
    assert [len(part) for part in run.minibatches(run.batch)] == 2 * [1, 1]


def test_every_epoch_learns_from_each_decision_once_in_another_order(make_run) -> None:
    run = make_run(traj_mini_batch_size=4, n_epochs=3)
    run.batch["place"] = torch.arange(12)
    places = [part["place"].tolist() for part in run.minibatches(run.batch)]
    epochs = [sum(places[begin : begin + 2], []) for begin in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3


def test_updates_of_different_sizes_follow_each_other(make_run) -> None:
    """Nothing of the batch before is left in the buffer, or in what it draws next."""
    run = make_run(n_epochs=1, traj_mini_batch_size=1)
    for outcomes in (((1, 0, 1), (0, 0, 1)), ((1, 0),), ((1, 0, 1, 0), (0, 0, 1), (1, 0))):
        batch = make_batch(run.actor, outcomes=outcomes)
        batch["place"] = torch.arange(len(batch))
        assert sorted(torch.cat([part["place"] for part in run.minibatches(batch)]).tolist()) == list(range(len(batch)))


def test_nothing_is_learned_from_groups_without_both_outcomes(make_run, capsys: pytest.CaptureFixture):
    run = make_run()
    metrics = run.update(make_batch(run.actor, outcomes=((0, 0, 0), (1, 1, 1))))
    assert torch.equal(weights(run.actor), weights(make_actor()))
    assert "No group had both outcomes (1 failed throughout, 1 succeeded throughout" in capsys.readouterr().out
    assert (metrics["rollout/groups"], metrics["rollout/groups_kept"]) == (2, 0)
    assert not any(name.startswith("train/") for name in metrics)


def test_nothing_is_learned_from_what_another_transform_drops(make_run, capsys: pytest.CaptureFixture):
    class Drop(Transform):
        def _inv_call(self, tensordict: TensorDictBase) -> None:
            return None

    run = make_run(advantage=Drop(), total_timesteps=2 * BATCH)
    run.learn()
    assert run.progress.updates == 2 and torch.equal(weights(run.actor), weights(make_actor()))
    assert capsys.readouterr().out.count("The buffer's transforms dropped every decision") == 2


def test_figures_of_groups_are_of_one_update(make_run):
    run = make_run()
    first, second = run.update(run.batch), run.update(make_batch(run.actor, outcomes=((1, 0), (0, 0))))
    assert (first["rollout/groups"], first["rollout/groups_dropped_all_failed"]) == (2, 0)
    assert (second["rollout/groups"], second["rollout/groups_dropped_all_failed"]) == (2, 1)
    assert (second["train/episodes"], second["train/dropped_episodes"]) == (2, 2)


def test_rows_of_several_environments(make_run):
    """A stock collector's batch: an estimator sees each row along its own time, GRPO takes rows of whole episodes."""
    run = make_run()
    rows = run.batch.reshape(2, 6)
    assert run.update(rows)["train/episodes"] == run.update(run.batch)["train/episodes"] == 6
    cut = run.batch.clone()
    cut["next", "done"][5] = False
    with pytest.raises(ValueError, match=r"rows \[2\] some end within one. Collect whole ones: Group"):
        run.update(cut.reshape(2, 6))


def test_an_estimator_sees_each_row_along_its_own_time(make_run):
    def estimate(batch: TensorDictBase) -> TensorDictBase:
        return batch.set("advantage", torch.arange(6.0).expand(batch.shape).unsqueeze(-1))

    run = make_run(advantage=EstimateAdvantage(estimate))
    cut = run.batch.clone()
    cut["next", "done"][5] = False
    learned = [part["advantage"] for part in run.minibatches(cut.reshape(2, 6))]
    assert sorted(torch.cat(learned).flatten().tolist()) == sorted(2 * 2 * list(range(6))), "2 rows, 2 epochs"


@pytest.mark.parametrize("rows", [1, 2])
def test_gae_is_computed_where_the_buffer_is_filled(make_run, rows: int):
    """By hand, gamma = lambda = 1/2 and no values: what follows counts half, then a quarter; a cut row ends alone."""
    run = make_run(advantage=EstimateAdvantage(GAE(gamma=0.5, lmbda=0.5, value_network=None)), n_epochs=1)
    batch = with_values(run.batch)
    batch["next", "reward"] = torch.arange(12.0).unsqueeze(-1)
    for flag in ("done", "terminated"):
        batch["next", flag] = (torch.arange(12) == 11).unsqueeze(-1)
    expected, following = [0.0] * 12, 0.0
    for place in reversed(range(12)):
        expected[place] = following = place + (0.0 if (place + 1) % (12 // rows) == 0 else 0.25 * following)
    (learned,) = run.minibatches(batch.reshape(rows, -1) if rows > 1 else batch)
    order = learned["next", "reward"].flatten().long()
    torch.testing.assert_close(learned["advantage"].flatten(), torch.tensor(expected)[order])
    torch.testing.assert_close(learned["value_target"], learned["advantage"])


def test_validates_and_saves_when_the_interval_is_passed(make_run):
    """An update has 24 control steps, so the third reaches 72; validation is due every 40, saving every 50."""
    run = make_run(total_timesteps=72, val_interval=40, save_interval=50, log_interval=1)
    run.learn(validate=run.validate, checkpoints=run)
    assert run.events == [("validate", 0), ("save", 0), ("validate", 48), ("validate", 72), ("save", 72)]
    assert [row["env_steps"] for row in run.logger.rows] == [0.0, 24.0, 48.0, 72.0]
    assert run.logger.rows[1]["rollout/success_rate"] == 0.5


def test_every_update_has_its_row_and_the_console_every_interval(make_run, capsys: pytest.CaptureFixture) -> None:
    run = make_run(total_timesteps=5 * BATCH, log_interval=2 * BATCH)
    run.learn()
    assert [row["update"] for row in run.logger.rows] == [1, 2, 3, 4, 5]
    assert all("train/loss" in row for row in run.logger.rows)
    output = capsys.readouterr().out
    assert [f"update {update}," in output for update in range(1, 6)] == [False, True, False, True, True]


def test_every_validation_is_logged(make_run) -> None:
    run = make_run(total_timesteps=5 * BATCH, val_interval=40, log_interval=1000)
    run.learn(validate=run.validate)
    assert [row["env_steps"] for row in run.logger.rows if "val/success_rate" in row] == [0.0, 48.0, 96.0, 120.0]


def test_a_checkpoint_is_written_before_the_first_update_and_only_in_a_new_run(make_run) -> None:
    """What is interrupted in its first update goes on from there."""
    run = make_run(total_timesteps=2 * BATCH)
    before, unchanged, save = weights(run.actor), [], run.save
    run.save = lambda **of: (save(**of), unchanged.append(torch.equal(weights(run.actor), before)))
    run.learn(checkpoints=run)
    assert run.events == [("save", 0), ("save", 48)] and run.saved == [None, None] and unchanged == [True, False]
    run.events.clear()
    run.config.total_timesteps = 3 * BATCH
    run.learn(checkpoints=run)
    assert run.events == [("save", 72)]


def test_a_checkpoint_has_the_success_of_a_validation_of_its_own_weights_only(make_run) -> None:
    """Not that of an older one, and the best is written in its update, whatever `save_interval`."""
    rates = iter([0.1, 0.9, 0.9, 0.4])
    run = make_run(total_timesteps=6 * BATCH, val_interval=2 * BATCH, save_interval=5 * BATCH)
    run.learn(validate=lambda steps: run.validate(steps, next(rates)), checkpoints=run)
    saves = [steps // BATCH for event, steps in run.events if event == "save"]
    # Before training; the best one; the interval, not validated; the end. Equal to the best is not better.
    assert list(zip(saves, run.saved, strict=True)) == [(0, 0.1), (2, 0.9), (5, None), (6, 0.4)]


@pytest.mark.parametrize("interval", [24, 1000])
def test_the_end_of_the_collector_is_the_end_of_the_run(make_run, capsys: pytest.CaptureFixture, interval: int) -> None:
    """Two updates of 24 control steps of the 120 wanted: the last is validated, logged and saved, and only once."""
    run = make_run(total_timesteps=120, val_interval=interval, save_interval=interval, log_interval=interval)
    run.batches = [run.batch.clone(), run.batch.clone()]
    run.learn(validate=run.validate, checkpoints=run)
    assert [event for event in run.events if event[1] == 48] == [("validate", 48), ("save", 48)]
    (last,) = [row for row in run.logger.rows if row["env_steps"] == 48 and "train/loss" in row]
    assert last["val/success_rate"] == 0.5
    assert sum(row["env_steps"] == 48 for row in run.logger.rows) == 1
    assert "The collector ended after update 2, 48 control steps, of 120 wanted." in capsys.readouterr().out


def test_a_collectors_own_copy_of_the_policy_gets_the_weights_of_every_update(make_run) -> None:
    class Copying:
        """As a Collector on another device."""

        def __init__(self) -> None:
            self.policy, self.used = make_actor(), []

        def __iter__(self) -> Iterator[TensorDictBase]:
            while True:
                self.used.append(weights(self.policy).clone())
                yield make_batch(self.policy)

        def update_policy_weights_(self, pushed: TensorDictBase) -> None:
            TensorDict.from_module(self.policy).data.update_(pushed)

    collector = Copying()
    run = make_run(collector, total_timesteps=3 * BATCH)
    run.learn(policy=run.actor)
    assert not torch.equal(collector.used[0], collector.used[1]) and not torch.equal(*collector.used[1:])
    assert torch.equal(weights(collector.policy), weights(run.actor))


def act(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[..., :2] / 2 - 1


def make_toy_policy() -> TensorDictSequential:
    return TensorDictSequential(
        make_actor(), TensorDictModule(act, in_keys=[("vla_action", "tokens")], out_keys=["action"])
    )


def any_advantage(batch: TensorDictBase) -> TensorDictBase:
    return batch.set("advantage", torch.linspace(-1, 1, batch.numel()).reshape(*batch.shape, 1))


@pytest.mark.processes
def test_workers_with_policies_of_their_own_act_with_the_newest_weights(make_run):
    """Then the first step of each update begins at ratio 1; rates are such that a step further back shows."""
    run = make_run(advantage=EstimateAdvantage(any_advantage), n_epochs=1, traj_mini_batch_size=100, total_timesteps=36)
    policy = make_toy_policy()
    actor = policy[0]
    run.step = OptimizerStep(AsymmetricClipPPOLoss(actor), torch.optim.SGD(actor.parameters(), lr=3.0), run.config)
    run.batches = MultiSyncCollector(
        [partial(ToyTrackingEnv, chunk_size=K)], policy_factory=[make_toy_policy], frames_per_batch=12, total_frames=-1,
        weight_sync_schemes={"policy": MultiProcessWeightSyncScheme()},
    )  # fmt: skip
    before = weights(actor)
    try:
        run.learn(policy=policy)
    finally:
        run.batches.shutdown()
    assert (weights(actor) - before).abs().max() > 0.1 and run.progress.updates >= 2
    for row in run.logger.rows:
        assert row["train/approx_kl"] == pytest.approx(0, abs=1e-6)
