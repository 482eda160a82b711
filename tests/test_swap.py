"""Every part next to TorchRL's own. Each pair takes an optimizer step, whose loss and gradient are compared by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ListStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import (
    Compose,
    ObservationNorm,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss, LossModule, ReinforceLoss
from torchrl.objectives.llm import MCAdvantage
from torchrl.objectives.value import GAE
from torchrl.record import CSVLogger, VideoRecorder
from torchrl.trainers import Trainer, UpdateWeights

from torchrl_vla.collectors import EpisodePlan, GroupCollector
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.actor import ActionTokenSampler, LogProbLevel, OpenVLAActor
from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage

CHUNK_SIZE, DIMS, TEMPERATURE = 2, 7, 1.6
GAMMA, LMBDA = 0.99, 0.95
LOW, HIGH = 0.2, 0.28
STATE, TOKENS, LOG_PROBS = ("observation", "state"), ("vla_action", "tokens"), ("vla_action", "log_probs")
make_env = partial(ToyTrackingEnv, chunk_size=CHUNK_SIZE, action_dim=DIMS, max_decisions=3)


class Backbone(nn.Module):
    """In the place of the 7B network: state to token logits and hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2 * DIMS, 16), nn.Tanh())
        self.head = nn.Linear(16, CHUNK_SIZE * DIMS * 256)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(state)
        return self.head(hidden).unflatten(-1, (CHUNK_SIZE, DIMS, 256)), hidden


def make_actor(log_prob_level: LogProbLevel = "token") -> OpenVLAActor:
    torch.manual_seed(0)
    outputs = [("vla_action", "logits"), ("vla_action", "hidden")]
    return OpenVLAActor(
        TensorDictModule(Backbone(), in_keys=[STATE], out_keys=outputs),
        ActionTokenSampler(
            ActionTokenizer(), chunk_size=CHUNK_SIZE, temperature=TEMPERATURE, log_prob_level=log_prob_level
        ),
    )


def make_critic() -> ValueOperator:
    return ValueOperator(nn.Linear(2 * DIMS, 1), in_keys=[STATE])


def decide_outcomes(batch: TensorDictBase) -> TensorDictBase:
    """Nobody succeeds in seven dimensions by chance, so half of the episodes are said to, after one of two actions."""
    ends = batch["next", "done"] & (batch["collector", "traj_ids"] % 2 == 0).reshape(-1, 1)
    batch["next", "success"], batch["next", "reward"] = ends, ends.float()
    batch["next", "num_control_steps"] = torch.where(ends, 1, batch["next", "num_control_steps"])
    batch["mask"] = torch.arange(CHUNK_SIZE) < batch["next", "num_control_steps"]
    return batch


def collect(policy: TensorDictModule) -> TensorDictBase:
    """Two groups of four episodes."""
    plan = EpisodePlan([(0, 1), (0, 2)], group_size=4)
    return decide_outcomes(GroupCollector(make_env(3), policy, seed=0).collect(plan))


def make_buffer(transform: nn.Module | None = None, storage: type = LazyTensorStorage) -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(
        storage=storage(100), sampler=SamplerWithoutReplacement(), batch_size=8, transform=transform
    )


# -- by hand ----------------------------------------------------------------------------------------------------------


def token_log_probs(actor: OpenVLAActor, batch: TensorDictBase) -> Tensor:
    """Straight from the network, ``[B, K, 7]``."""
    logits, _ = actor[0].module(batch[STATE])
    return torch.log_softmax(logits / TEMPERATURE, -1).gather(-1, batch[TOKENS].unsqueeze(-1)).squeeze(-1)


def clipped_by_hand(log_ratio: Tensor, advantage: Tensor, mask: Tensor | None = None) -> Tensor:
    ratio = log_ratio.exp()
    advantage = advantage.reshape(-1, *(1,) * (ratio.ndim - 1))
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
    if mask is None:
        return -gain.mean()
    mask = mask.reshape(*mask.shape, *(1,) * (gain.ndim - mask.ndim)).expand_as(gain)
    return -gain[mask].mean()


def whitened_returns(batch: TensorDictBase) -> Tensor:
    """(R - mean) / std of each episode in its group of four, at every decision ``[T]``."""
    episode = batch["collector", "traj_ids"] - batch["collector", "traj_ids"][0]
    returns = torch.zeros(8).index_add(0, episode, batch["next", "reward"].squeeze(-1)).view(2, 4)
    scores = (returns - returns.mean(1, keepdim=True)) / returns.std(1, keepdim=True)
    return scores.flatten()[episode]


def gae_by_hand(batch: TensorDictBase, values: Tensor, following: Tensor) -> Tensor:
    """GAE's recursion along a row, ``[T]`` each; an end is terminal if the data say so."""
    step = {name: batch["next", name].squeeze(-1) for name in ("reward", "done", "terminated")}
    advantage, after = torch.zeros(len(batch)), torch.zeros(())
    for t in reversed(range(len(batch))):
        delta = step["reward"][t] + GAMMA * following[t] * ~step["terminated"][t] - values[t]
        after = advantage[t] = delta + GAMMA * LMBDA * after * ~step["done"][t]
    return advantage


def take_a_step(
    loss: LossModule, batch: TensorDictBase, by_hand: Callable[[], Tensor], *modules: nn.Module, exact: float = 1e-5
) -> None:
    """Loss and gradient are those computed by hand, and every parameter moves."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1)
    optimizer.zero_grad()
    terms = loss(batch)
    total = sum(value for key, value in terms.items() if key.startswith("loss_"))
    expected = by_hand()
    torch.testing.assert_close(total, expected, atol=exact, rtol=1e-4)
    gradients = torch.autograd.grad(expected, parameters)
    total.backward()
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=exact, rtol=1e-3)
    optimizer.step()
    assert all(not torch.equal(*pair) for pair in zip(before, parameters, strict=True))


def move(actor: nn.Module) -> None:
    """A step away from the policy that collected, so that some ratios are clipped."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_class", [ClipPPOLoss, AsymmetricClipPPOLoss])
@pytest.mark.parametrize("masked", [True, False])
def test_losses_of_tokens(loss_class, masked):
    """Actions that were never executed do not count, in the stock loss where `loss_mask_key` names the mask."""
    actor = make_actor()
    buffer = make_buffer(GRPOAdvantage())
    buffer.extend(collect(actor) if masked else collect(actor).exclude("mask", ("next", "num_control_steps")))
    batch = buffer.sample(16)
    move(actor)
    loss = loss_class(actor, clip_epsilon=(LOW, HIGH), entropy_bonus=False)
    if masked:
        assert 0 < (~batch["mask"]).sum() < 8
        loss.loss_mask_key = "mask"
    mask = batch["mask"] if masked else None
    assert 0 < loss(batch)["clip_fraction"] < 1

    def by_hand() -> Tensor:
        return clipped_by_hand(token_log_probs(actor, batch) - batch[LOG_PROBS], batch["advantage"], mask)

    take_a_step(loss, batch, by_hand, actor)


@pytest.mark.parametrize("loss_class", [ClipPPOLoss, AsymmetricClipPPOLoss, A2CLoss, ReinforceLoss])
def test_losses_of_whole_decisions_with_a_critic(loss_class):
    """A2C and REINFORCE score decisions, not tokens: the actor gives one log-probability per chunk."""
    actor, critic = make_actor("chunk"), make_critic()
    buffer = make_buffer(GRPOAdvantage())
    buffer.extend(collect(actor))
    batch = buffer.sample(16)
    assert batch[LOG_PROBS].shape == batch.batch_size
    options = {
        ClipPPOLoss: {"clip_epsilon": (LOW, HIGH), "entropy_bonus": False},
        AsymmetricClipPPOLoss: {"ratio_level": "chunk", "clip_ratio_low": LOW, "clip_ratio_high": HIGH},
        A2CLoss: {"entropy_bonus": False},
        ReinforceLoss: {},
    }[loss_class]
    loss = loss_class(actor, critic, loss_critic_type="smooth_l1", **options)
    loss.set_keys(action=TOKENS, value_target="episode_return")

    def by_hand() -> Tensor:
        log_prob, advantage = token_log_probs(actor, batch).flatten(1).sum(1), batch["advantage"].squeeze(-1)
        if loss_class in (A2CLoss, ReinforceLoss):
            objective = -(log_prob * advantage).mean()
        else:
            objective = clipped_by_hand(log_prob - batch[LOG_PROBS], advantage)
        return objective + smooth_l1_loss(critic.module(batch[STATE]), batch["episode_return"])

    take_a_step(loss, batch, by_hand, actor, critic, exact=1e-4)


@pytest.mark.parametrize("loss_class", [ClipPPOLoss, AsymmetricClipPPOLoss])
def test_keys_of_other_names(loss_class):
    actor = make_actor()
    names = {"advantage": "score", "action": ("chosen", "bins"), "sample_log_prob": "old_log_prob"}
    batch = GRPOAdvantage(advantage_key="score").inv(collect(actor))
    batch[names["action"]], batch["old_log_prob"] = batch[TOKENS], batch[LOG_PROBS]
    loss = loss_class(actor, clip_epsilon=(LOW, HIGH), entropy_bonus=False)
    loss.set_keys(**names)
    loss.loss_mask_key = "mask"

    def by_hand() -> Tensor:
        return clipped_by_hand(token_log_probs(actor, batch) - batch[LOG_PROBS], batch["score"], batch["mask"])

    take_a_step(loss, batch.exclude(TOKENS, LOG_PROBS), by_hand, actor)


def test_our_loss_takes_tensors_in_the_place_of_a_tensordict():
    actor = make_actor()
    batch = GRPOAdvantage().inv(collect(actor))
    loss = AsymmetricClipPPOLoss(actor, clip_ratio_low=LOW, clip_ratio_high=HIGH)
    given = {"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in loss.in_keys}
    terms = dict(zip(loss.out_keys, loss(**given), strict=True))
    assert terms["loss_objective"].requires_grad
    for name, value in loss(batch).items():
        torch.testing.assert_close(terms[name], value)


# -- advantages and buffers -------------------------------------------------------------------------------------------


class UsersBuffer:
    """All that a buffer of someone's own has to do."""

    def __init__(self, transform: nn.Module) -> None:
        self.transform, self.rows = transform, []

    def extend(self, batch: TensorDictBase) -> None:
        self.rows += self.transform.inv(batch).unbind(0)

    def sample(self, size: int) -> TensorDictBase:
        return torch.stack(self.rows[:size])


@pytest.mark.parametrize("loss_class", [ClipPPOLoss, AsymmetricClipPPOLoss])
@pytest.mark.parametrize(
    "buffer_class", [make_buffer, partial(make_buffer, storage=ListStorage), UsersBuffer], ids=["tensor", "list", "own"]
)
@pytest.mark.parametrize(
    "advantage",
    [GRPOAdvantage, partial(MCAdvantage, grpo_size=4, prompt_key="group_id", trajectory_return="sum")],
    ids=["ours", "MCAdvantage"],
)
def test_group_advantages_and_buffers(advantage, buffer_class, loss_class):
    actor = make_actor()
    batch = collect(actor)
    batch["expected"] = whitened_returns(batch).unsqueeze(-1)
    buffer = buffer_class(advantage())
    buffer.extend(batch)
    sample = buffer.sample(16)
    torch.testing.assert_close(sample["advantage"], sample["expected"], atol=1e-4, rtol=1e-4)
    loss = loss_class(actor, clip_epsilon=(LOW, HIGH), entropy_bonus=False)
    loss.loss_mask_key = "mask"

    def by_hand() -> Tensor:
        log_ratio = token_log_probs(actor, sample) - sample[LOG_PROBS]
        return clipped_by_hand(log_ratio, sample["expected"], sample["mask"])

    take_a_step(loss, sample, by_hand, actor)


@pytest.mark.parametrize("of_the_rollout", [True, False])
def test_gae_on_our_batches(of_the_rollout):
    """With the values that the policy's critic wrote, or with a network that needs no next observations."""
    actor, critic = make_actor(), make_critic()
    batch = collect(TensorDictSequential(*actor, critic) if of_the_rollout else actor)
    with torch.no_grad():
        values = critic.module(batch[STATE]).squeeze(-1)
    if of_the_rollout:
        torch.testing.assert_close(batch["state_value"].squeeze(-1), values)
        GAE(gamma=GAMMA, lmbda=LMBDA, value_network=None)(batch)
    else:
        GAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic, shifted=True)(batch)
    advantage = gae_by_hand(batch, values, values.roll(-1))
    torch.testing.assert_close(batch["advantage"].squeeze(-1), advantage, atol=1e-5, rtol=1e-4)
    loss = AsymmetricClipPPOLoss(
        actor, critic, clip_ratio_low=LOW, clip_ratio_high=HIGH, ratio_level="action", loss_critic_type="l2"
    )

    def by_hand() -> Tensor:
        log_ratio = (token_log_probs(actor, batch) - batch[LOG_PROBS]).sum(-1)
        objective = clipped_by_hand(log_ratio, advantage, batch["mask"])
        return objective + (critic.module(batch[STATE]).squeeze(-1) - advantage - values).square().mean()

    take_a_step(loss, batch, by_hand, actor, critic)


def test_transforms_composed_on_the_buffer():
    actor = make_actor()
    batch = collect(actor)
    doubled = ObservationNorm(0.0, 2.0, in_keys=[STATE], out_keys=[("observation", "doubled")])
    buffer = make_buffer(Compose(GRPOAdvantage(), doubled))
    buffer.extend(batch)
    sample = buffer.sample(16)
    torch.testing.assert_close(sample["observation", "doubled"], 2 * sample[STATE])

    def by_hand() -> Tensor:
        log_ratio = token_log_probs(actor, sample) - sample[LOG_PROBS]
        return clipped_by_hand(log_ratio, sample["advantage"], sample["mask"])

    take_a_step(
        AsymmetricClipPPOLoss(actor, clip_ratio_low=LOW, clip_ratio_high=HIGH), sample, by_hand, actor, exact=1e-5
    )


# -- collectors -------------------------------------------------------------------------------------------------------


def update_with_gae(actor: OpenVLAActor, batch: TensorDictBase) -> None:
    """GAE with a network on a batch ``[T]`` or ``[N, T]`` of a stock collector, and PPO."""
    critic = make_critic()
    with torch.no_grad():
        rows = batch.reshape(-1, batch.shape[-1])
        values, following = (critic.module(data[STATE]).squeeze(-1) for data in (rows, rows["next"]))
        advantage = torch.stack([gae_by_hand(*row) for row in zip(rows, values, following, strict=True)]).flatten()
    GAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic)(batch)
    flat = batch.reshape(-1)
    torch.testing.assert_close(flat["advantage"].squeeze(-1), advantage, atol=1e-5, rtol=1e-4)
    loss = AsymmetricClipPPOLoss(
        actor, critic, clip_ratio_low=LOW, clip_ratio_high=HIGH, ratio_level="action", loss_critic_type="l2"
    )
    before = loss(flat)
    assert before["kl_approx"].abs() < 1e-6 and before["max_ratio"] == pytest.approx(1, abs=1e-5)

    def by_hand() -> Tensor:
        objective = clipped_by_hand((token_log_probs(actor, flat) - flat[LOG_PROBS]).sum(-1), advantage)
        return objective + (critic.module(flat[STATE]).squeeze(-1) - advantage - values.flatten()).square().mean()

    take_a_step(loss, flat, by_hand, actor, critic)


@pytest.mark.parametrize("layout", [make_env, partial(make_env, 2), partial(SerialEnv, 2, make_env)])
def test_the_stock_collector(layout):
    actor = make_actor()
    collector = Collector(layout(), actor, frames_per_batch=24, total_frames=48, auto_register_policy_transforms=False)
    batches = iter(collector)
    for _ in range(2):  # on one policy object, so that the second batch comes from the weights of the first step
        batch = next(batches).clone()
        assert batch.numel() == 24 and batch[LOG_PROBS].shape[-2:] == (CHUNK_SIZE, DIMS)
        update_with_gae(actor, batch)
    collector.shutdown()


@pytest.mark.processes
@pytest.mark.parametrize("collector_class", [MultiSyncCollector, MultiAsyncCollector])
def test_stock_collectors_of_other_processes(collector_class):
    actor = make_actor()
    collector = collector_class([make_env], actor, frames_per_batch=24, total_frames=-1)
    try:
        batches = iter(collector)
        update_with_gae(actor, next(batches).clone())
        collector.update_policy_weights_(actor)
        # A batch of the asynchronous one may have been begun with the old weights.
        fresh = next(batch for _, batch in zip(range(10), batches, strict=False) if is_on_policy(actor, batch))
        update_with_gae(actor, fresh.clone())
    finally:
        collector.shutdown()


def is_on_policy(actor: OpenVLAActor, batch: TensorDictBase) -> bool:
    with torch.no_grad():
        return torch.allclose(token_log_probs(actor, batch), batch[LOG_PROBS], atol=1e-5)


def test_group_advantages_with_the_stock_collector():
    """Whole episodes, one after the other: `trajs_per_batch` with `traj_format="cat"`."""
    actor = make_actor()
    collector = Collector(
        make_env(4), actor, trajs_per_batch=8, traj_format="cat", frames_per_batch=24, total_frames=240,
        auto_register_policy_transforms=False,
    )  # fmt: skip
    batch = decide_outcomes(next(iter(collector)).clone())
    collector.shutdown()
    scored = GRPOAdvantage(group_keys=["task_id"]).inv(batch)
    loss = AsymmetricClipPPOLoss(actor, clip_ratio_low=LOW, clip_ratio_high=HIGH)

    def by_hand() -> Tensor:
        succeeds = batch["collector", "traj_ids"] % 2 == 0  # half of the episodes: mean 1/2, variance 2/7
        advantage = (succeeds.float() - 0.5) / (2 / 7) ** 0.5
        return clipped_by_hand(token_log_probs(actor, batch) - batch[LOG_PROBS], advantage, batch["mask"])

    take_a_step(loss, scored, by_hand, actor)


@pytest.mark.parametrize("loss_class", [ClipPPOLoss, AsymmetricClipPPOLoss])
def test_torchrls_trainer_on_our_collector(loss_class):
    """Two updates by TorchRL's trainer, which saves and loads too, and the same two by hand."""

    def parts() -> tuple[OpenVLAActor, GroupCollector, torch.optim.Optimizer]:
        actor = make_actor()
        plans = EpisodePlan.stream({0: range(50)}, groups=2, group_size=4, seed=0)
        return actor, GroupCollector(make_env(3), actor, plans), torch.optim.Adam(actor.parameters(), 1e-3)

    def score(batch: TensorDictBase) -> TensorDictBase:
        return GRPOAdvantage().inv(decide_outcomes(batch))

    actor, collector, optimizer = parts()
    loss = loss_class(actor, clip_epsilon=(LOW, HIGH), entropy_bonus=False)
    loss.loss_mask_key = "mask"
    trainer = Trainer(
        collector=collector, total_frames=48, frame_skip=1, optim_steps_per_batch=2, loss_module=loss,
        optimizer=optimizer, clip_grad_norm=False, progress_bar=False, seed=3,
    )  # fmt: skip
    trainer.register_op("batch_process", score)
    trainer.register_op("post_steps", UpdateWeights(collector, 1))
    trainer.train()
    assert trainer.collected_frames == 48 and collector.stats()["batches"] == 2
    assert trainer.state_dict()["collector"]["plans"] == 2

    by_hand, source, adam = parts()
    source.set_seed(3)
    for _, batch in zip(range(2), source, strict=False):
        batch = score(batch)
        for _ in range(2):
            adam.zero_grad()
            log_ratio = token_log_probs(by_hand, batch) - batch[LOG_PROBS]
            clipped_by_hand(log_ratio, batch["advantage"], batch["mask"]).backward()
            adam.step()
    for parameter, expected in zip(actor.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-4)

    resumed = parts()[1]
    restored = Trainer(
        collector=resumed, total_frames=96, frame_skip=1, optim_steps_per_batch=1, loss_module=copy.deepcopy(loss),
        progress_bar=False,
    )  # fmt: skip
    restored.load_state_dict(trainer.state_dict())
    assert next(iter(resumed))["group_id"].unique().tolist() == [4, 5]


# -- exploration and environments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN])
def test_exploration_types_that_do_not_sample(mode):
    actor = make_actor()
    batch = GroupCollector(make_env(2), actor, exploration_type=mode).collect(EpisodePlan([(0, 1), (0, 2)]))
    logits, _ = actor[0].module(batch[STATE])
    assert torch.equal(batch[TOKENS], logits.argmax(-1))
    with set_exploration_type(mode):
        rollout = make_env().rollout(3, actor)
    assert torch.equal(rollout[TOKENS], actor[0].module(rollout[STATE])[0].argmax(-1))


@pytest.mark.processes
@pytest.mark.parametrize("wrapper", [SerialEnv, partial(ParallelEnv, mp_start_method="fork")])
def test_batched_environments(wrapper):
    env = wrapper(2, make_env)
    try:
        check_env_specs(env)
        rollout = env.rollout(4, make_actor(), break_when_any_done=False)
        assert rollout.shape == (2, 4)
        assert rollout["next", "truncated"].squeeze(-1).tolist() == [[False, False, True, False]] * 2
    finally:
        env.close()


@pytest.mark.parametrize("batched", [False, True])
def test_environment_transforms(batched, tmp_path):
    """Counters and sums start anew with each episode of a slot, and films have every frame."""
    logger = CSVLogger("films", str(tmp_path), video_format="pt")
    recorder = VideoRecorder(logger, "film", [("observation", "image")], skip=1)
    base = partial(ToyTrackingEnv, chunk_size=2, action_dim=2, max_decisions=3)
    env = TransformedEnv(SerialEnv(1, base) if batched else base(1), Compose(StepCounter(), RewardSum(), recorder))

    def act(tensordict: TensorDictBase) -> TensorDictBase:
        """The target for even initial states: success at the end of the first decision."""
        target = tensordict["observation", "state"][..., 2:].unsqueeze(-2).repeat_interleave(2, -2)
        even = (tensordict["init_state_id"] % 2 == 0).unsqueeze(-1)
        return tensordict.set("action", torch.where(even, target, 1.0))

    collector = GroupCollector(env, act, next_keys=["step_count", "episode_reward", "success"])
    batch = collector.collect(EpisodePlan([(0, 1), (0, 2), (0, 3)]))
    assert batch["step_count"].flatten().tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert batch["next", "step_count"].flatten().tolist() == [1, 2, 3, 1, 1, 2, 3]
    assert batch["next", "episode_reward"].flatten().tolist() == [0, 0, 0, 1, 0, 0, 0]
    env.transform.dump()
    (film,) = tmp_path.rglob("*.pt")
    assert torch.load(film).shape[1] == len(batch) + 3  # and what each of three resets showed
