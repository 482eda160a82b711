"""An optimizer step: the gradient it follows, in whatever memory there is, at the rate that the schedule says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDictBase
from token_policy import K, make_actor, make_batch, weights
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss, LossModule
from torchrl.objectives.value import GAE

from torchrl_vla.config import PPOConfig
from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage
from torchrl_vla.training.figures import step_figures
from torchrl_vla.training.optimizer_step import OptimizerStep, TrainingDiverged
from torchrl_vla.training.run_checkpoints import RunCheckpoints
from torchrl_vla.training.schedule import LearningRateSchedule

RATE = 1e-2


def make_step(
    actor: nn.Module, loss: LossModule | None = None, *modules: nn.Module, rate: float = RATE, **values
) -> OptimizerStep:
    parameters = [parameter for module in (actor, *modules) for parameter in module.parameters()]
    config = PPOConfig(**{"lr_warmup_steps": 0, "traj_split_num": 1, "val_interval": 0} | values)
    loss = AsymmetricClipPPOLoss(actor) if loss is None else loss
    return OptimizerStep(loss, torch.optim.SGD(parameters, lr=rate), config)


def scored(actor: nn.Module) -> TensorDictBase:
    """Twelve decisions with advantages."""
    return GRPOAdvantage().inv(make_batch(actor))


def stock_loss(actor: nn.Module) -> ClipPPOLoss:
    loss = ClipPPOLoss(actor, None, entropy_bonus=False, clip_epsilon=(0.2, 0.28), functional=False)
    loss.set_keys(action=("vla_action", "tokens"), sample_log_prob=("vla_action", "log_probs"))
    return loss


@pytest.mark.parametrize("traj_split_num", [1, 4])
@pytest.mark.parametrize("make_loss", [AsymmetricClipPPOLoss, stock_loss])
def test_steps_do_not_depend_on_the_micro_batch(make_loss, traj_split_num: int):
    results = []
    for batch_size in (1, 5, 100):
        actor = make_actor()
        step = make_step(actor, make_loss(actor), batch_size=batch_size, traj_split_num=traj_split_num)
        for _ in range(2):
            step(scored(actor))
        results.append(weights(actor))
    assert not torch.allclose(results[0], weights(make_actor()), atol=1e-4)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio_level", ["token", "action", "chunk"])
def test_the_figures_do_not_depend_on_the_micro_batch(ratio_level: str) -> None:
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
        batch = GAE(gamma=0.9, lmbda=0.9, value_network=critic)(batch)
        loss = AsymmetricClipPPOLoss(
            actor, critic, ratio_level=ratio_level, entropy_coeff=0.01, kl_coeff=0.1, clip_value=0.2
        )
        step = make_step(actor, loss, critic, batch_size=batch_size)
        return step_figures([step(minibatch) for _ in range(2) for minibatch in batch.split(6)])

    expected = figures(100)
    assert {"train/max_ratio", "train/ESS", "train/explained_variance", "train/value_clip_fraction"} <= set(expected)
    for batch_size in (1, 4):
        assert figures(batch_size) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_first_gradient_is_the_policy_gradient():
    """Before the first step the ratio is 1, so the gradient is that of -mean(advantage * log-probability)."""
    actor, other = make_actor(), make_actor()
    before, data = weights(actor), scored(actor)
    figures = make_step(actor, max_grad_norm=1e9)(data)
    log_prob = other.get_dist(data).log_prob(data["vla_action", "tokens"])
    (-(log_prob * data["advantage"].unsqueeze(-1)).mean()).backward()
    gradient = nn.utils.parameters_to_vector([p.grad for p in other.parameters()])
    torch.testing.assert_close(before - weights(actor), RATE * gradient, rtol=1e-4, atol=1e-7)
    assert figures["kl_approx"].item() == pytest.approx(0.0, abs=1e-6)
    assert figures["clip_fraction"] == 0
    assert figures["grad_norm"].item() == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_a_step_is_no_longer_than_the_bound_on_the_gradient() -> None:
    actor = make_actor()
    before = weights(actor)
    figures = make_step(actor, max_grad_norm=0.01)(scored(actor))
    assert figures["grad_norm"] > 0.02
    assert (weights(actor) - before).norm().item() == pytest.approx(RATE * 0.01, rel=1e-2)


@pytest.mark.parametrize(("parts", "sizes"), [(1, [12]), (4, [3, 3, 3, 3])])
def test_a_mini_batch_is_split_however_much_memory_there_is(parts: int, sizes: list[int]) -> None:
    actor = make_actor()
    step = make_step(actor, batch_size=100, traj_split_num=parts)
    seen: list[int] = []
    step.loss.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    step(scored(actor))
    assert seen == sizes


def rates_of(step: OptimizerStep, data: TensorDictBase, steps: int) -> list[float]:
    """The learning rates that steps have, seen from how far the clipped gradient moves the weights."""
    rates = []
    for _ in range(steps):
        before = weights(step.loss.actor_network)
        step(data)
        moved = (weights(step.loss.actor_network) - before).norm().item()
        rates.append(moved / step.config.max_grad_norm)
    return rates


def test_the_learning_rate_rises_and_goes_on_from_where_it_was(tmp_path: Path) -> None:
    """Resumed through a checkpoint, at the rate that the options then say: the optimizer's state has the old one."""

    def make(folder: Path, rate: float, warmup_steps: int) -> tuple[OptimizerStep, RunCheckpoints]:
        step = make_step(make_actor(), rate=rate, max_grad_norm=0.1)
        step.schedule = LearningRateSchedule(step.optimizer, warmup_steps=warmup_steps)
        parts = {"policy": step.loss.actor_network, "optimizer": step.optimizer, "schedule": step.schedule}
        return step, RunCheckpoints(folder, keep=1, step=step, **parts)

    data = scored(make_actor())
    step, checkpoints = make(tmp_path, RATE, 4)
    assert rates_of(step, data, 2) == pytest.approx([2.5e-3, 5e-3], rel=1e-2)
    checkpoints.save(step=1, success=None)
    resumed, checkpoints = make(tmp_path, 2 * RATE, 4)
    checkpoints.load_latest()
    assert resumed.optimizer_steps == 2
    assert rates_of(resumed, data, 3) == pytest.approx([1.5e-2, 2e-2, 2e-2], rel=1e-2)
    at_once, _ = make(tmp_path / "third", RATE, 0)
    assert rates_of(at_once, data, 2) == pytest.approx([1e-2, 1e-2], rel=1e-2)


def test_a_scheduler_of_torch_takes_effect() -> None:
    actor = make_actor()
    step = make_step(actor, max_grad_norm=0.1)
    step.schedule = ExponentialLR(step.optimizer, gamma=0.5)
    assert rates_of(step, scored(actor), 3) == pytest.approx([RATE, RATE / 2, RATE / 4], rel=1e-2)


def test_without_a_schedule_the_optimizers_rates_stay() -> None:
    """Whoever changes them between steps finds them as they were left."""
    actor = make_actor()
    step = make_step(actor, max_grad_norm=0.1, lr_warmup_steps=100, actor_lr=1.0)
    step.optimizer.param_groups[0]["lr"] = 3e-3
    assert rates_of(step, scored(actor), 2) == pytest.approx([3e-3, 3e-3], rel=1e-2)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 0.75, 0.5, 0]), ("cosine", [0.5, 0.853553, 0.5, 0])],
)
def test_the_rate_falls_with_the_runs_progress(decay: str, expected: list[float]) -> None:
    """Two optimizer steps of warm-up, then down to 0 at the end of the run, for every group in its proportion."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 10.0)]
    optimizer = torch.optim.SGD(groups)
    schedule = LearningRateSchedule(optimizer, warmup_steps=2, decay=decay)
    rates = [schedule.get_last_lr()]
    for progress in (0.25, 0.5, 1.5):
        optimizer.step()
        schedule.set_progress(progress)
        schedule.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [pytest.approx([factor, 10 * factor], abs=1e-5) for factor in expected]
    with pytest.raises(ValueError, match="decay='quadratic' is unknown: choose one of"):
        LearningRateSchedule(optimizer, decay="quadratic")


def test_a_broken_gradient_is_skipped_and_ends_the_run_if_it_stays():
    """Nor does the schedule move on."""
    actor = make_actor()
    step = make_step(actor, max_bad_updates=3)
    step.schedule = LearningRateSchedule(step.optimizer, warmup_steps=10)
    data = scored(actor)
    data["observation", "state"][0] = float("nan")
    before = weights(actor)
    for _ in range(2):
        step(data)
    with pytest.raises(TrainingDiverged, match="3 optimizer steps in a row were not finite"):
        step(data)
    assert torch.equal(weights(actor), before) and step.optimizer_steps == 0
    assert step.schedule.get_last_lr() == pytest.approx([RATE / 10])


class Exhausted(AsymmetricClipPPOLoss):
    """Has room for three decisions at a time, and needs some of them to notice."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if len(tensordict) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(tensordict)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_batch(capsys: pytest.CaptureFixture):
    """Mini-batches of 12 decisions: up to 10, 5, then 2 at a time, said once for each halving, with the same result."""
    actor, expected = make_actor(), make_actor()
    plain, step = make_step(expected, batch_size=2), make_step(actor, Exhausted(actor, None), batch_size=10)
    done: list[int] = []
    for _ in range(2):
        plain(scored(expected))
        step(scored(actor), done.append)
    torch.testing.assert_close(weights(actor), weights(expected), rtol=0, atol=1e-6)
    assert step.micro_batch.size == 2 and step.optimizer_steps == 2
    assert sum(done) == 2 * 12, "what is repeated is taken back from the progress"
    said = capsys.readouterr().out
    assert said.count("Out of GPU memory") == 2
    assert "with micro-batches of 5 decisions: from here on they have 2" in said


class ExhaustedLate(AsymmetricClipPPOLoss):
    """Runs out of memory once, in the third pass, when gradients of two have been added up."""

    calls = 0

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.calls += 1
        if self.calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(tensordict)


def test_what_was_added_up_before_memory_ran_out_does_not_count_twice():
    actor, expected = make_actor(), make_actor()
    done: list[int] = []
    make_step(expected, batch_size=4)(scored(expected))
    make_step(actor, ExhaustedLate(actor, None), batch_size=4)(scored(actor), done.append)
    torch.testing.assert_close(weights(actor), weights(expected), rtol=0, atol=1e-6)
    assert done[:3] == [4, 4, -8] and sum(done) == 12


def test_memory_for_not_even_one_decision_is_an_error_with_advice():
    class Full(AsymmetricClipPPOLoss):
        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    actor = make_actor()
    before = weights(actor)
    with pytest.raises(RuntimeError, match="does not hold the forward and backward pass of one decision"):
        make_step(actor, Full(actor, None), batch_size=2)(scored(actor))
    assert torch.equal(weights(actor), before)


def test_finite_steps_between_broken_ones_keep_the_run_going(capsys: pytest.CaptureFixture):
    """Only broken steps in a row count, and each is skipped: here every other one, so that the run goes on."""

    class Flickering(AsymmetricClipPPOLoss):
        calls = 0

        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            terms = super().forward(tensordict)
            self.calls += 1
            return terms.set("loss_objective", terms["loss_objective"] * (float("inf") if self.calls % 2 else 1.0))

    actor = make_actor()
    step = make_step(actor, Flickering(actor, None), batch_size=100, max_bad_updates=2)
    for _ in range(4):
        step(scored(actor))
    assert step.bad_steps == 0 and step.optimizer_steps == 2 and torch.isfinite(weights(actor)).all()
    assert not torch.equal(weights(actor), weights(make_actor()))
    assert capsys.readouterr().out.count("is skipped (1 in a row, the run stops at 2)") == 2


def test_the_names_that_figures_have_in_logs() -> None:
    """Means of the steps that have a figure, by the guide's names."""
    step: dict[str, Tensor] = {name: torch.tensor(1.0) for name in ("loss_objective", "loss_critic", "kl_approx")}
    other = {name: torch.tensor(3.0) for name in step} | {"kl_approx": torch.tensor(float("nan"))}
    assert step_figures([step, other]) == {
        "train/policy_loss": 2.0, "train/weighted_value_loss": 2.0, "train/approx_kl": 1.0,
    }  # fmt: skip
