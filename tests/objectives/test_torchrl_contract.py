"""AsymmetricClipPPOLoss in the place of TorchRL's ClipPPOLoss: its arguments, its numbers, its trainer."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.modules import PercentileValueNorm, ValueOperator
from torchrl.objectives import ClipPPOLoss, PPOLoss
from torchrl.objectives.value import GAE
from torchrl.trainers import Trainer

from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.objectives import AsymmetricClipPPOLoss

from .policy_table import make_actor, make_batch, random_batch, total, with_every_term

#: Arguments of TorchRL's that are refused, each with a value that asks for something.
REFUSED = {
    "functional": True,
    "delay_actor": True,
    "max_importance_ratio": 2.0,
    "gamma": 0.9,
    "advantage_key": "a",
    "value_target_key": "t",
    "value_key": "v",
}


def parameters_of(loss_class: type) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(loss_class.__init__).parameters
    return {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name != "self"}


def test_every_argument_of_torchrl_s_is_taken_or_refused_by_name():
    theirs = parameters_of(PPOLoss) | parameters_of(ClipPPOLoss)
    taken = set(parameters_of(AsymmetricClipPPOLoss)) | {"actor", "critic"}
    assert set(theirs) - taken == set(REFUSED)
    actor = make_actor(make_batch()[0])
    for name, value in REFUSED.items():
        with pytest.raises(TypeError, match=f"does not take {name}={value!r}: "):
            AsymmetricClipPPOLoss(actor, **{name: value})
    nothing_asked = {name: theirs[name].default for name in REFUSED} | {"functional": False}
    AsymmetricClipPPOLoss(actor, **nothing_asked)
    with pytest.raises(TypeError, match="no argument 'clip_ratio'"):
        AsymmetricClipPPOLoss(actor, clip_ratio=0.1)
    with pytest.raises(TypeError, match="entropy_coef=0.1: it is called entropy_coeff"):
        AsymmetricClipPPOLoss(actor, entropy_coef=0.1)
    with pytest.raises(TypeError, match="actor_network"):
        AsymmetricClipPPOLoss()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_epsilon": 1.5}, "clip_ratio_low=1.5"),
        ({"clip_epsilon": (0.2, -0.1)}, "clip_ratio_high=-0.1"),
        ({"clip_epsilon": 0.1, "clip_ratio_low": 0.3}, "clip_epsilon=0.1 and clip_ratio_low=0.3"),
        ({"entropy_coeff": {"head": 0.1}}, "entropy_coeff={'head': 0.1} must be one number"),
        ({"entropy_bonus": False, "entropy_coeff": 0.1}, "entropy_coeff=0.1 needs entropy_bonus=True"),
        (
            {"loss_critic_type": "huber"},
            r"loss_critic_type='huber' is unknown: choose one of \('l1', 'l2', 'smooth_l1'",
        ),
        ({"clip_value": -0.1}, "clip_value=-0.1 must be positive"),
        ({"clip_value": True}, "clip_value=True cannot infer"),
        ({"reduction": "avg"}, "reduction='avg' is unknown"),
        ({"normalize_advantage": True, "advantage_norm": PercentileValueNorm()}, "mutually exclusive"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AsymmetricClipPPOLoss(make_actor(make_batch()[0]), **options)


def make_pair(table: nn.Module, **options: Any) -> tuple[ClipPPOLoss, AsymmetricClipPPOLoss]:
    """The two losses of whole decisions, on copies of one policy and one critic."""
    critic = ValueOperator(nn.Linear(3, 1).double(), in_keys=[("vla_action", "hidden")])
    options = {"clip_epsilon": 0.2, "loss_critic_type": "l2", "functional": False} | options
    networks = [copy.deepcopy((make_actor(table, 2), critic)) for _ in range(2)]
    return ClipPPOLoss(*networks[0], **options), AsymmetricClipPPOLoss(*networks[1], ratio_level="chunk", **options)


def whole_decisions() -> tuple[nn.Module, TensorDict]:
    table, data = random_batch()
    data["vla_action", "log_probs"] = data["vla_action", "log_probs"].sum((-1, -2))
    return table, data.exclude("mask")


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_coeff": 0.02},
        {"entropy_bonus": True, "entropy_coeff": 0.02, "critic_coeff": 0.5, "loss_critic_type": "smooth_l1"},
        {"entropy_bonus": True, "entropy_coeff": 0.0, "loss_critic_type": "l1", "clip_value": 0.2},
        {"entropy_bonus": False, "entropy_coeff": 0.0, "clip_epsilon": (0.1, 0.3), "log_explained_variance": False},
        {"entropy_coeff": 0.02, "clip_value": True, "separate_losses": True},
        {"entropy_coeff": 0.02, "normalize_advantage": True},
        {"entropy_coeff": 0.02, "normalize_advantage": True, "normalize_advantage_exclude_dims": (1,)},
        {"entropy_coeff": 0.02, "reduction": "sum"},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_numbers_and_a_step_are_torchrl_s_where_the_settings_coincide(options, masked):
    table, data = whole_decisions()
    stock, ours = make_pair(table, **options)
    ours.load_state_dict(stock.state_dict(), strict=False)
    if masked and not options.get("normalize_advantage"):  # TorchRL normalises with what is masked
        data["collector", "mask"] = torch.tensor([True] * 6 + [False] * 3).unsqueeze(-1)
    steps = []
    for loss in (stock, ours):
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        terms = loss(data)
        total(terms).backward()
        optimizer.step()
        steps.append(({key: value.detach() for key, value in terms.items()}, list(loss.parameters())))
    (expected, theirs), (terms, parameters) = steps
    assert set(terms) - set(expected) == {"num_ratios", "value_loss"} | {"entropy"} - set(expected)
    assert set(expected) <= set(terms)
    for key, value in expected.items():
        if key.startswith("loss_") or not masked:  # TorchRL's mask does not reach its diagnostics
            torch.testing.assert_close(terms[key], value.squeeze(), msg=key)
    for mine, other in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_no_reduction_keeps_each_value_and_adds_up():
    table, data = random_batch()
    loss = with_every_term(table, "token")
    mean, (tokens, decisions) = loss(data), (loss.valid_tokens(data), data["mask"].any(-1))
    loss.reduction = "none"
    single = loss(data)
    for key, value in single.items():
        if key.startswith("loss_"):
            valid = decisions if key == "loss_critic" else tokens
            assert value.shape == valid.shape and (value[~valid] == 0).all()
            torch.testing.assert_close(value.sum() / valid.sum(), mean[key])
        else:
            torch.testing.assert_close(value, mean[key])
    stock, ours = make_pair(table, entropy_coeff=0.02, reduction="none")
    data = whole_decisions()[1]
    ours.load_state_dict(stock.state_dict(), strict=False)
    for key, value in stock(data).items():
        if key.startswith("loss_"):
            torch.testing.assert_close(ours(data)[key], value, msg=key)
    loss.reduction = "sum"
    for key, value in loss(data := random_batch()[1]).items():
        if key.startswith("loss_"):
            torch.testing.assert_close(value, single[key].sum(), msg=key)


def test_micro_batches_that_would_not_add_up_are_refused():
    table, data = random_batch()
    for options, message in (({"reduction": "sum"}, "reduction='sum'"), ({"normalize_advantage": True}, "average_gae")):
        loss = AsymmetricClipPPOLoss(make_actor(table), **options)
        with pytest.raises(ValueError, match=message):
            loss.set_normalizer(loss.count_valid(data))
        loss.set_normalizer(None)


def test_only_valid_advantages_are_normalised():
    """Of 1, 3 and a masked 100: -1/sqrt(2) and 1/sqrt(2)."""
    table, data = make_batch(torch.ones(3, 1, 1), torch.tensor([[1.0], [3.0], [100.0]]))
    data["mask"] = torch.tensor([True, True, False])
    data["vla_action", "log_probs"][1] += torch.tensor(2.0).log()  # a ratio of 1/2
    terms = AsymmetricClipPPOLoss(make_actor(table), normalize_advantage=True)(data)
    assert terms["loss_objective"].item() == pytest.approx(-(-1 + 0.5) / 2**0.5 / 2)


def test_the_advantage_norm_divides():
    table, data = make_batch()
    norm = PercentileValueNorm()
    norm.update(torch.tensor([[0.0], [1000.0]]))
    terms = AsymmetricClipPPOLoss(make_actor(table), advantage_norm=norm)(data)
    plain = AsymmetricClipPPOLoss(make_actor(table))(data)
    assert norm.scale().item() != 1
    torch.testing.assert_close(terms["loss_objective"], plain["loss_objective"] / norm.scale().squeeze())


class Opaque(torch.distributions.Categorical):
    """Without an entropy in closed form, as far as TorchRL sees."""

    entropy = torch.distributions.Distribution.entropy


def test_an_entropy_without_closed_form_is_sampled():
    table, data = random_batch()
    actor, exact = make_actor(table), AsymmetricClipPPOLoss(make_actor(table))(data)["entropy"]
    sampler = actor.module[-1]
    sampler.distribution_class = lambda logits: Opaque(logits=logits, validate_args=False)
    torch.manual_seed(0)
    loss = AsymmetricClipPPOLoss(actor, entropy_coeff=0.1, samples_mc_entropy=2000)
    terms = loss(data)
    assert terms["entropy"].item() == pytest.approx(exact.item(), abs=0.03)
    assert terms["loss_entropy"].item() == pytest.approx(-0.1 * terms["entropy"].item())


def test_older_names_of_the_networks_and_the_device():
    table, data = random_batch()
    critic = ValueOperator(nn.Linear(3, 1).double(), in_keys=[("vla_action", "hidden")])
    old = AsymmetricClipPPOLoss(actor=make_actor(table), critic=critic)
    torch.testing.assert_close(
        dict(old(data).items()), dict(AsymmetricClipPPOLoss(make_actor(table), critic)(data).items())
    )
    meta = AsymmetricClipPPOLoss(make_actor(table), device=torch.device("meta"))
    assert {b.device.type for b in (meta.kl_coeff, meta.entropy_coeff, meta.clip_epsilon_low)} == {"meta"}


def test_a_call_with_keywords():
    table, data = random_batch()
    loss = with_every_term(table, "token")
    expected = loss(data)
    keywords = {
        "_".join(key) if isinstance(key, tuple) else key: data.get(key)
        for key in loss.in_keys
        if data.get(key, None) is not None
    }
    keywords["next_num_control_steps"] = torch.full((9, 1), 2)
    assert {"row", "vla_action_tokens", "advantage", "mask", "value_target"} <= set(keywords)
    for key, value in zip(loss.out_keys, loss(**keywords), strict=True):
        torch.testing.assert_close(value, expected[key], msg=key)


def test_every_key_can_be_set():
    table, data = random_batch()
    loss = with_every_term(table, "token")
    expected = loss(data)
    names = {
        "sample_log_prob": ("vla_action", "log_probs"),
        "action": ("vla_action", "tokens"),
        "target_action": ("vla_action", "chunk"),
        "mask": "mask",
        "advantage": "advantage",
        "value_target": "value_target",
    }
    for name, key in names.items():
        data[f"my_{name}"] = data.pop(key)
    loss.set_keys(**{name: f"my_{name}" for name in names})
    assert {f"my_{name}" for name in names} <= set(loss.in_keys)
    torch.testing.assert_close(dict(loss(data).items()), dict(expected.items()))
    with pytest.raises(ValueError, match="no_such is not an accepted tensordict key"):
        loss.set_keys(no_such="x")


def make_toy_actor() -> ProbabilisticTensorDictSequential:
    """Tokens 0 and 1 of two control steps of seven numbers, as actions of -0.5 and 0.5."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(14, 2 * 7 * 2), nn.Unflatten(-1, (2, 7, 2)))
    return ProbabilisticTensorDictSequential(
        TensorDictModule(layers, in_keys=[("observation", "state")], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=[("vla_action", "tokens")],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            log_prob_key=("vla_action", "log_probs"),
            default_interaction_type="random",
        ),
    )


def to_action(tokens: Tensor) -> Tensor:
    return tokens.float() - 0.5


def test_torchrl_s_trainer_takes_the_step_that_the_loss_asks_for():
    actor = make_toy_actor()
    critic = ValueOperator(nn.Linear(14, 1), in_keys=[("observation", "state")])
    policy = TensorDictModule(to_action, in_keys=[("vla_action", "tokens")], out_keys=["action"])
    collector = Collector(
        ToyTrackingEnv(2, chunk_size=2, action_dim=7, max_decisions=3),
        TensorDictSequential(actor, policy),
        frames_per_batch=12,
        total_frames=12,
        auto_register_policy_transforms=False,
    )
    loss = AsymmetricClipPPOLoss(actor, critic, entropy_coeff=0.01)
    before, batches = copy.deepcopy(loss), []
    trainer = Trainer(
        collector=collector,
        total_frames=12,
        frame_skip=1,
        optim_steps_per_batch=1,
        loss_module=loss,
        optimizer=torch.optim.SGD(loss.parameters(), 0.1),
        clip_grad_norm=False,
        clip_norm=1e6,
        progress_bar=False,
    )
    gae = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    trainer.register_op("batch_process", lambda batch: batches.append(gae(batch).reshape(-1)) or batches[-1])
    trainer.train()
    (batch,) = batches
    optimizer = torch.optim.SGD(before.parameters(), 0.1)
    total(before(batch)).backward()
    optimizer.step()
    for expected, parameter in zip(before.parameters(), loss.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
    assert all(not torch.equal(*pair) for pair in zip(make_toy_actor().parameters(), actor.parameters(), strict=True))
