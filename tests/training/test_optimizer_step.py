"""The loop: what it does to the policy, and when it validates, saves, skips and stops."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_vla.config import PPOConfig
from torchrl_vla.modules.distributions import TokenCategorical
from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.optimizer_step import PPOTrainer, TrainingDiverged

K, DIMS, BINS = 2, 3, 5


def make_actor() -> ProbabilisticTensorDictSequential:
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(4, K * DIMS * BINS), nn.Unflatten(-1, (K, DIMS, BINS)))
    return ProbabilisticTensorDictSequential(
        TensorDictModule(logits, in_keys=[("observation", "state")], out_keys=[("vla_action", "logits")]),
        ProbabilisticTensorDictModule(
            in_keys={"logits": ("vla_action", "logits")},
            out_keys=[("vla_action", "tokens")],
            distribution_class=TokenCategorical,
            return_log_prob=True,
            log_prob_key=("vla_action", "log_probs"),
        ),
    )


def make_batch(actor: nn.Module, *, outcomes: tuple[tuple[int, ...], ...] = ((1, 0, 1), (0, 0, 1))) -> TensorDictBase:
    """Episodes of two decisions of two control steps; `outcomes` holds one success flag per episode, by group."""
    torch.manual_seed(1)
    episodes = [(group, success) for group, row in enumerate(outcomes) for success in row]
    rows = [(group, bool(success) and last, last) for group, success in episodes for last in (False, True)]
    group, success, done = (torch.tensor(column).unsqueeze(-1) for column in zip(*rows, strict=True))
    data = TensorDict(
        {
            "observation": {"state": torch.randn(len(rows), 4)},
            "group_id": group,
            "next": {
                "done": done,
                "success": success,
                "reward": success.float(),
                "num_control_steps": torch.full_like(group, K),
            },
        },
        batch_size=[len(rows)],
    )
    with torch.no_grad():
        return actor(data).exclude(("vla_action", "logits"))


class Collector:
    """Yields the same batch for ever, as an on-policy collector would yield fresh ones."""

    def __init__(self, batch: TensorDictBase) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[TensorDictBase]:
        while True:
            yield self.batch.clone()


def make_trainer(tmp_path: Path, *, batch: TensorDictBase | None = None, loss_class=AsymmetricClipPPOLoss, **values):
    actor = make_actor()
    calls = values.pop("calls", {})
    defaults = {"n_epochs": 2, "actor_lr": 1e-2, "lr_warmup_steps": 0, "entropy_coef": 0.0, "val_interval": 0}
    config = PPOConfig(**{**defaults, **values})
    loss = loss_class(actor, None) if loss_class is AsymmetricClipPPOLoss else loss_class
    trainer = PPOTrainer(
        config,
        Collector(make_batch(actor) if batch is None else batch),
        loss,
        GRPOAdvantage(),
        torch.optim.SGD(actor.parameters(), lr=config.actor_lr),
        RunLogger(tmp_path),
        **calls,
    )
    return trainer, actor


def weights(actor: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(actor.parameters()).detach()


def test_a_batch_is_freed_before_the_next_is_collected(tmp_path: Path) -> None:
    trainer, actor = make_trainer(tmp_path, total_timesteps=3 * 12 * K)
    freed = []

    def batches() -> Iterator[TensorDictBase]:
        while True:
            batch = make_batch(actor)
            state = weakref.ref(batch["observation", "state"])
            yield batch
            del batch
            freed.append(state() is None)

    trainer.collector = batches()
    trainer.train()
    assert trainer.updates == 3 and freed == [True, True]


@pytest.mark.parametrize("traj_split_num", [1, 4])
def test_the_update_does_not_depend_on_the_micro_batch(tmp_path: Path, traj_split_num: int):
    results = []
    for batch_size in (1, 5, 100):
        trainer, actor = make_trainer(tmp_path, batch_size=batch_size, traj_split_num=traj_split_num)
        trainer.update(trainer.collector.batch)
        results.append(weights(actor))
    assert not torch.allclose(results[0], weights(make_actor()), atol=1e-4)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio_level", ["token", "action", "chunk"])
def test_the_figures_do_not_depend_on_the_micro_batch(tmp_path: Path, ratio_level: str) -> None:
    """With GAE, a value head and masks, so that micro-batches have different shares of what the figures are of."""

    def figures(batch_size: int) -> dict[str, float]:
        actor = make_actor()
        batch = make_batch(actor)
        log_probs = batch["vla_action", "log_probs"]
        log_probs += 0.3 * torch.randn_like(log_probs)
        batch["vla_action", "reference_log_probs"] = log_probs - 0.1 * torch.rand_like(log_probs)
        batch["mask"] = torch.rand(len(batch), K) > 0.3
        batch["mask"][0] = False
        batch["next", "observation", "state"] = torch.randn(len(batch), 4)
        batch["next", "terminated"] = batch["next", "done"]
        # Returns that are far from 0 beside their spread.
        batch["next", "reward"] = torch.randn(len(batch), 1) + 30
        critic = ValueOperator(nn.Linear(4, 1), in_keys=[("observation", "state")])
        trainer = PPOTrainer(
            PPOConfig(n_epochs=2, batch_size=batch_size, traj_split_num=1, traj_mini_batch_size=3, val_interval=0),
            [],
            AsymmetricClipPPOLoss(
                actor, critic, ratio_level=ratio_level, entropy_coeff=0.01, kl_coeff=0.1, clip_value=0.2
            ),
            GAE(gamma=0.9, lmbda=0.9, value_network=critic),
            torch.optim.SGD([*actor.parameters(), *critic.parameters()], lr=1e-2),
            RunLogger(tmp_path / f"{batch_size}"),
        )
        return {name: value for name, value in trainer.update(batch).items() if name.startswith("train/")}

    expected = figures(100)
    assert {"train/max_ratio", "train/ESS", "train/explained_variance", "train/value_clip_fraction"} <= set(expected)
    for batch_size in (1, 4):
        assert figures(batch_size) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_first_gradient_is_the_policy_gradient(tmp_path: Path):
    """Before the first step the ratio is 1, so the gradient is that of -mean(advantage * log-probability)."""
    trainer, actor = make_trainer(tmp_path, n_epochs=1, traj_mini_batch_size=100, max_grad_norm=1e9)
    batch = trainer.collector.batch
    before = weights(actor)
    metrics = trainer.update(batch)
    other = make_actor()
    data = GRPOAdvantage().inv(batch)
    log_prob = other.get_dist(data).log_prob(data["vla_action", "tokens"])
    (-(log_prob * data["advantage"].unsqueeze(-1)).mean()).backward()
    gradient = nn.utils.parameters_to_vector([p.grad for p in other.parameters()])
    torch.testing.assert_close(before - weights(actor), 1e-2 * gradient, rtol=1e-4, atol=1e-7)
    assert metrics["train/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["train/clipfrac"] == 0.0
    assert metrics["train/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_a_step_is_no_longer_than_the_bound_on_the_gradient(tmp_path: Path) -> None:
    trainer, actor = make_trainer(tmp_path, n_epochs=1, traj_mini_batch_size=100, max_grad_norm=0.01)
    before = weights(actor)
    metrics = trainer.update(trainer.collector.batch)
    assert metrics["train/grad_norm"] > 0.02
    assert (weights(actor) - before).norm().item() == pytest.approx(1e-2 * 0.01, rel=1e-2)


@pytest.mark.parametrize(("trajectories", "steps_per_epoch"), [(1, 6), (2, 3), (4, 2), (100, 1)])
def test_a_mini_batch_has_so_many_trajectories_worth_of_decisions(
    tmp_path: Path, trajectories: int, steps_per_epoch: int
) -> None:
    """Six trajectories of two decisions."""
    trainer, _ = make_trainer(tmp_path, n_epochs=2, traj_mini_batch_size=trajectories)
    assert trainer.update(trainer.collector.batch)["train/optimizer_steps"] == 2 * steps_per_epoch


@pytest.mark.parametrize(("parts", "sizes"), [(1, [12]), (4, [3, 3, 3, 3])])
def test_a_mini_batch_is_split_however_much_memory_there_is(tmp_path: Path, parts: int, sizes: list[int]) -> None:
    trainer, _ = make_trainer(tmp_path, batch_size=100, traj_split_num=parts, n_epochs=1)
    seen: list[int] = []
    trainer.loss.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer.update(trainer.collector.batch)
    assert seen == sizes


def test_the_learning_rate_rises_and_goes_on_from_where_it_was(tmp_path: Path) -> None:
    def learning_rates(trainer: PPOTrainer, updates: int) -> list[float]:
        rates = []
        for _ in range(updates):
            trainer.update(trainer.collector.batch)
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        return rates

    one_step = {"n_epochs": 1, "traj_mini_batch_size": 100}
    trainer, actor = make_trainer(tmp_path / "first", lr_warmup_steps=4, **one_step)
    before = weights(actor)
    assert learning_rates(trainer, 2) == pytest.approx([2.5e-3, 5e-3])
    first_step = weights(actor) - before
    resumed, _ = make_trainer(tmp_path / "second", lr_warmup_steps=4, actor_lr=2e-2, **one_step)
    resumed.load_state_dict(trainer.state_dict())
    resumed.optimizer.load_state_dict(trainer.optimizer.state_dict())
    assert learning_rates(resumed, 3) == pytest.approx([1.5e-2, 2e-2, 2e-2]), "at the rate it is resumed with"
    at_once, actor = make_trainer(tmp_path / "third", **one_step)
    assert learning_rates(at_once, 2) == pytest.approx([1e-2, 1e-2])
    assert first_step.norm() < 0.5 * (weights(actor) - before).norm()


def test_stock_loss_runs_and_does_not_depend_on_the_micro_batch(tmp_path: Path):
    results = []
    for batch_size in (1, 100):
        actor = make_actor()
        stock = ClipPPOLoss(actor, None, entropy_bonus=False, clip_epsilon=(0.2, 0.28), functional=False)
        stock.set_keys(action=("vla_action", "tokens"), sample_log_prob=("vla_action", "log_probs"))
        trainer = PPOTrainer(
            PPOConfig(n_epochs=2, batch_size=batch_size, traj_split_num=1, val_interval=0),
            Collector(make_batch(actor)),
            stock,
            GRPOAdvantage(),
            torch.optim.SGD(actor.parameters(), lr=1e-2),
            RunLogger(tmp_path),
        )
        trainer.update(trainer.collector.batch)
        results.append(weights(actor))
    assert not torch.allclose(results[0], weights(make_actor()), atol=1e-5)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_nothing_is_learned_from_groups_without_both_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture):
    trainer, actor = make_trainer(tmp_path)
    metrics = trainer.update(make_batch(actor, outcomes=((0, 0, 0), (1, 1, 1))))
    assert torch.equal(weights(actor), weights(make_actor()))
    assert "No group had both outcomes (1 failed throughout, 1 succeeded throughout" in capsys.readouterr().out
    assert (metrics["rollout/groups"], metrics["rollout/groups_kept"]) == (2, 0)
    assert not any(name.startswith("train/") for name in metrics)


def test_rows_of_several_environments(tmp_path: Path):
    """A stock collector's batch: an estimator sees each row along its own time, GRPO takes rows of whole episodes."""
    trainer, actor = make_trainer(tmp_path)
    flat = make_batch(actor)
    rows = flat.reshape(2, 6)
    assert trainer.update(rows)["train/episodes"] == trainer.update(flat)["train/episodes"] == 6
    cut = flat.clone()
    cut["next", "done"][5] = False
    with pytest.raises(
        ValueError, match=r"of the collector's rows \[2\] some end within one. Collect whole ones: Group"
    ):
        trainer.update(cut.reshape(2, 6))

    def estimate(batch: TensorDictBase) -> TensorDictBase:
        return batch.set("advantage", torch.arange(6.0).expand(batch.shape).unsqueeze(-1))

    trainer.advantage, learned = estimate, []
    trainer.backward_pass = lambda micro, **options: learned.append(micro["advantage"]) or {"loss": torch.ones(())}
    trainer.backward_pass.zero_grad = lambda: None
    trainer.update(cut.reshape(2, 6))
    assert sorted(torch.cat(learned).flatten().tolist()) == sorted(2 * 2 * list(range(6))), "2 rows, 2 epochs"


def test_validates_and_saves_when_the_interval_is_passed(tmp_path: Path):
    """An update has 24 control steps, so the third reaches 72; validation is due every 40, saving every 50."""
    events: list[tuple[str, int]] = []
    trainer, _ = make_trainer(
        tmp_path,
        total_timesteps=72,
        val_interval=40,
        save_interval=50,
        log_interval=1,
        calls={
            "validate": lambda: events.append(("validate", trainer.env_steps)) or {"val/success_rate": 0.5},
            "save": lambda trainer: events.append(("save", trainer.env_steps)),
        },
    )
    trainer.train()
    assert events == [("validate", 0), ("validate", 48), ("validate", 72), ("save", 72)]
    assert [row["env_steps"] for row in trainer.logger.rows] == [0.0, 24.0, 48.0, 72.0]
    assert trainer.logger.rows[1]["rollout/success_rate"] == 0.5


def test_every_validation_is_logged(tmp_path: Path) -> None:
    calls = {"validate": lambda: {"val/success_rate": 0.5}}
    trainer, _ = make_trainer(tmp_path, total_timesteps=120, val_interval=40, log_interval=1000, calls=calls)
    trainer.train()
    assert [row["env_steps"] for row in trainer.logger.rows if "val/success_rate" in row] == [0.0, 48.0, 96.0, 120.0]


@pytest.mark.parametrize("interval", [24, 1000])
def test_the_end_of_the_collector_is_the_end_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, interval: int
) -> None:
    """Two updates of 24 control steps of the 120 wanted: the last is validated, logged and saved, and only once."""
    events: list[tuple[str, int]] = []
    trainer, actor = make_trainer(
        tmp_path,
        total_timesteps=120,
        val_interval=interval,
        save_interval=interval,
        log_interval=interval,
        calls={
            "validate": lambda: events.append(("validate", trainer.env_steps)) or {"val/success_rate": 0.5},
            "save": lambda trainer: events.append(("save", trainer.env_steps)),
        },
    )
    trainer.collector = [make_batch(actor), make_batch(actor)]
    trainer.train()
    assert [event for event in events if event[1] == 48] == [("validate", 48), ("save", 48)]
    (last,) = [row for row in trainer.logger.rows if row["env_steps"] == 48]
    assert last["val/success_rate"] == 0.5 and "train/loss" in last
    assert "The collector ended after 48 of 120 control steps." in capsys.readouterr().out


def test_a_broken_gradient_is_skipped_and_ends_the_run_if_it_stays(tmp_path: Path):
    trainer, actor = make_trainer(tmp_path, max_bad_updates=3, n_epochs=5)
    batch = trainer.collector.batch
    batch["observation", "state"][0] = float("nan")
    before = weights(actor)
    with pytest.raises(TrainingDiverged, match="3 optimizer steps in a row were not finite"):
        trainer.update(batch)
    assert torch.equal(weights(actor), before)


class Exhausted(AsymmetricClipPPOLoss):
    """Has room for three decisions at a time, and needs some of them to notice."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if len(tensordict) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(tensordict)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Mini-batches of 12 decisions: up to 10, 5, then 2 at a time, said once for each halving, with the same result."""
    plain, expected = make_trainer(tmp_path, batch_size=2, traj_split_num=1)
    plain.update(plain.collector.batch)
    trainer, actor = make_trainer(tmp_path, batch_size=10, traj_split_num=1)
    trainer.loss = trainer.backward_pass.loss = Exhausted(actor, None)
    metrics = trainer.update(trainer.collector.batch)
    torch.testing.assert_close(weights(actor), weights(expected), rtol=0, atol=1e-6)
    assert trainer.micro_batch.size == 2 and metrics["train/optimizer_steps"] == 2
    said = capsys.readouterr().out
    assert said.count("Out of GPU memory") == 2
    assert "with micro-batches of 5 decisions: from here on they have 2" in said


def test_memory_for_not_even_one_decision_is_an_error_with_advice(tmp_path: Path):
    class Full(AsymmetricClipPPOLoss):
        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer, actor = make_trainer(tmp_path, batch_size=2)
    trainer.loss = trainer.backward_pass.loss = Full(actor, None)
    before = weights(actor)
    with pytest.raises(RuntimeError, match="does not hold the forward and backward pass of one decision"):
        trainer.update(trainer.collector.batch)
    assert torch.equal(weights(actor), before)


def test_finite_steps_between_broken_ones_keep_the_run_going(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Only broken steps in a row count, and each is skipped: here every other one, so that the run goes on."""

    class Flickering(AsymmetricClipPPOLoss):
        calls = 0

        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            terms = super().forward(tensordict)
            self.calls += 1
            return terms.set("loss_objective", terms["loss_objective"] * (float("inf") if self.calls % 2 else 1.0))

    trainer, actor = make_trainer(tmp_path, batch_size=100, traj_split_num=1, n_epochs=4, max_bad_updates=2)
    trainer.loss = trainer.backward_pass.loss = Flickering(actor, None)
    trainer.update(trainer.collector.batch)
    assert trainer.bad_steps == 0 and torch.isfinite(weights(actor)).all()
    assert not torch.equal(weights(actor), weights(make_actor()))
    assert capsys.readouterr().out.count("is skipped (1 in a row, the run stops at 2)") == 2
