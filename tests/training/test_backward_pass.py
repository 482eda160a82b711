"""Recorded passes, their recordings run again instead of replayed: padding, what stays in place, what is read live."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDictBase
from test_openvla_update import make_decisions, make_policy
from torch import Tensor, nn
from torchrl.modules import ValueOperator

from torchrl_vla.modules import OpenVLAActor
from torchrl_vla.modules.openvla.lora import without_adapters
from torchrl_vla.objectives import AsymmetricClipPPOLoss
from torchrl_vla.objectives.combining import combine
from torchrl_vla.training.backward_pass import BackwardPass, RecordedPass

CPU = torch.device("cpu")


class Repeater:
    """Runs a function again where a GPU would replay it: before it is recorded, then at each replay."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        function()
        result = function()
        return lambda: result.copy_(function()), result

    def clear(self) -> None:
        self.recorded = 0


def make_pass(*, recorded: bool, **coefficients: float) -> tuple[BackwardPass, OpenVLAActor]:
    actor = make_policy()
    model = actor.backbone.model
    model.accelerate(compile_layers=False)
    loss = AsymmetricClipPPOLoss(
        actor, None, entropy_coeff=0.01, reference_context=lambda: without_adapters(model), **coefficients
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    if recorded:
        return RecordedPass(loss, optimizer, CPU, actor.backbone.prepare, Repeater()), actor
    return BackwardPass(loss, optimizer, CPU), actor


def gradients(a_pass: BackwardPass) -> list[Tensor]:
    (group,) = a_pass.optimizer.param_groups
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in group["params"]]


def accumulate(a_pass: BackwardPass, data: TensorDictBase, rows: int) -> list[dict[str, Tensor]]:
    counts = a_pass.loss.count_valid(data)
    a_pass.zero_grad()
    return [a_pass(micro, rows=rows, counts=counts) for micro in data.split(rows)]


def assert_equal_to_eager(rows: int, change: Callable[[TensorDictBase], object], **coefficients: float) -> None:
    """Gradients and terms of two optimizer steps."""
    found, expected = [], []
    for recorded, results in ((True, found), (False, expected)):
        a_pass, actor = make_pass(recorded=recorded, **coefficients)
        data = make_decisions(actor)
        change(data)
        for _ in range(2):
            terms = accumulate(a_pass, data, rows)
            results.append((gradients(a_pass), [{name: float(v) for name, v in term.items()} for term in terms]))
            a_pass.optimizer.step()
    for (found_gradients, found_terms), (expected_gradients, expected_terms) in zip(found, expected, strict=True):
        largest = float(max(gradient.abs().max() for gradient in expected_gradients))
        assert largest > 1e-3
        torch.testing.assert_close(found_gradients, expected_gradients, atol=2e-6 * largest, rtol=1e-5)
        for found_term, expected_term in zip(found_terms, expected_terms, strict=True):
            assert found_term == pytest.approx(expected_term, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rows", [6, 4, 1])
def test_padding_adds_nothing_and_weights_are_read_live(rows: int) -> None:
    """Of 6 decisions, 4 at a time leaves 2 for the second pass, which is filled up; the second step follows a first."""
    assert_equal_to_eager(rows, lambda data: None)


def test_masks_of_the_data_hold_beside_those_of_the_padding() -> None:
    def mask(data: TensorDictBase) -> None:
        data["mask"] = torch.tensor([True, False, True, True, True, False])[:, None].expand(-1, 2)
        data["advantage"][1] = float("nan")
        data["next", "reward"] = torch.zeros(len(data), 1)

    assert_equal_to_eager(4, mask)


def test_the_reference_is_computed_before_the_recorded_part() -> None:
    assert_equal_to_eager(4, lambda data: None, kl_coeff=0.5)


def test_gradients_stay_where_they_are() -> None:
    a_pass, actor = make_pass(recorded=True)
    data = make_decisions(actor)
    accumulate(a_pass, data, 4)
    parameters = [p for p in actor.parameters() if p.grad is not None]
    first, places = gradients(a_pass), [p.grad.data_ptr() for p in parameters]
    # Whoever frees the gradients in between does no harm.
    nn.Module.zero_grad(actor)
    accumulate(a_pass, data, 4)
    torch.testing.assert_close(gradients(a_pass), first)
    assert [p.grad.data_ptr() for p in parameters] == places


def test_the_coefficients_of_the_loss_are_read_live() -> None:
    a_pass, actor = make_pass(recorded=True)
    data = make_decisions(actor)
    (before,) = accumulate(a_pass, data, 6)
    a_pass.loss.entropy_coeff.mul_(3)
    (after,) = accumulate(a_pass, data, 6)
    assert float(after["loss_entropy"]) == pytest.approx(3 * float(before["loss_entropy"]), rel=1e-5)


def test_the_counts_are_those_of_each_mini_batch() -> None:
    a_pass, actor = make_pass(recorded=True)
    data = make_decisions(actor)
    counts = a_pass.loss.count_valid(data)
    half = a_pass(data, rows=6, counts=counts.apply(lambda count: 2 * count))
    whole = a_pass(data, rows=6, counts=counts)
    assert float(whole["loss"]) == pytest.approx(2 * float(half["loss"]), rel=1e-5)


def test_padding_does_not_change_the_combined_figures() -> None:
    """Those of 6 decisions, 4 at a time, are those of the loss alone, the critic's too."""
    actor = make_policy()
    data = make_decisions(actor)
    noise = torch.Generator().manual_seed(2)
    data["vla_action", "log_probs"] += 0.3 * torch.randn(data["vla_action", "log_probs"].shape, generator=noise)
    data["value_target"] = torch.randn(len(data), 1, generator=noise)
    width = actor.backbone.model.config.hidden_size
    critic = ValueOperator(nn.Linear(width, 1), in_keys=[("vla_action", "hidden")])
    loss = AsymmetricClipPPOLoss(actor, critic)
    expected = {name: value.item() for name, value in loss(data).items()}
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=0.0)
    a_pass = RecordedPass(loss, optimizer, CPU, actor.backbone.prepare, Repeater())
    figures = combine(accumulate(a_pass, data, 4))
    assert {"ESS", "explained_variance"} < set(expected)
    for name, value in expected.items():
        assert figures[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_copies_of_the_adapters_follow_before_a_replay() -> None:
    """A replay does not run the forward's own look at them."""
    _, actor = make_pass(recorded=True)
    model, data = actor.backbone.model, make_decisions(make_policy())
    actor.backbone.prepare(data)
    with torch.no_grad():
        actor(data.clone())  # makes the copies
        for name, parameter in model.named_parameters():
            if ".lora_A" in name:
                parameter.mul_(2)
    copies = [adapters for stack in model._stacks for adapters in stack.adapters()]
    assert copies and not any(torch.equal(c.down[: len(c.downs[0])], c.downs[0]) for c in copies)
    actor.backbone.prepare(data)
    assert all(torch.equal(c.down[: len(c.downs[0])], c.downs[0]) for c in copies)


def test_weights_that_lie_elsewhere_are_recorded_again() -> None:
    """A recording reads and updates the memory that they had."""
    found: list[list[Tensor]] = []
    for recorded in (True, False):
        a_pass, actor = make_pass(recorded=recorded)
        data = make_decisions(actor)
        accumulate(a_pass, data, 4)
        before = list(a_pass._recordings.values()) if recorded else []
        for parameter in actor.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data * 1.5
        accumulate(a_pass, data, 4)
        found.append(gradients(a_pass))
        if recorded:
            assert len(before) == len(a_pass._recordings) == 1
            assert before[0] is not next(iter(a_pass._recordings.values()))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


def test_few_shapes_stay_recorded() -> None:
    a_pass, actor = make_pass(recorded=True)
    recorder, data = a_pass._recorder, make_decisions(actor)
    counts = a_pass.loss.count_valid(data)
    for rows in (1, 2, 3, 4, 4, 1):
        a_pass(data[:1], rows=rows, counts=counts)
    assert recorder.recorded == 4
    a_pass(data[:1], rows=5, counts=counts)  # 2 was not used for longest
    for rows in (1, 3, 4, 5):
        a_pass(data[:1], rows=rows, counts=counts)
    assert recorder.recorded == 5
    a_pass(data[:1], rows=2, counts=counts)
    assert recorder.recorded == 6
    a_pass.forget()
    a_pass(data[:1], rows=2, counts=counts)
    assert recorder.recorded == 1


def test_a_recorded_pass_has_no_other_scale_than_the_counts() -> None:
    a_pass, actor = make_pass(recorded=True)
    with pytest.raises(ValueError, match="counts"):
        a_pass(make_decisions(actor), rows=6)
