"""Every part next to TorchRL's own: our policy and buffer under stock losses, our loss under the stock collector."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import ParallelEnv, SerialEnv, check_env_specs
from torchrl.modules import ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss, LossModule, ReinforceLoss
from torchrl.objectives.value import GAE

from torchrl_vla.collectors import EpisodePlan, GroupCollector
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.actor import ActionTokenSampler, LogProbLevel, OpenVLAActor
from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage

CHUNK_SIZE, DIMS = 2, 7
STATE = ("observation", "state")
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
        ActionTokenSampler(ActionTokenizer(), chunk_size=CHUNK_SIZE, temperature=1.6, log_prob_level=log_prob_level),
    )


def make_critic() -> ValueOperator:
    return ValueOperator(nn.Linear(2 * DIMS, 1), in_keys=[STATE])


def collect(actor: OpenVLAActor) -> TensorDictBase:
    """Two groups of four episodes; nobody succeeds in seven dimensions by chance, so half of the ends are said to."""
    batch = GroupCollector(make_env(3), actor).collect(EpisodePlan([(0, 1), (0, 2)], group_size=4))
    ends = batch["next", "done"] & (batch["collector", "traj_ids"] % 2 == 0).unsqueeze(-1)
    batch["next", "success"], batch["next", "reward"] = ends, ends.float()
    return batch


def make_buffer(batch: TensorDictBase, advantage: GRPOAdvantage | None = None) -> TensorDictReplayBuffer:
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(100), sampler=SamplerWithoutReplacement(drop_last=True), batch_size=8
    )
    if advantage is not None:
        buffer.append_transform(advantage)
    buffer.extend(batch)
    return buffer


def take_a_step(loss: LossModule, batch: TensorDictBase, *modules: nn.Module) -> None:
    """Every module must move, and stay finite."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    terms = loss(batch)
    sum(value for key, value in terms.items() if key.startswith("loss_")).backward()
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in parameters)
    assert all(not torch.equal(*pair) for pair in zip(before, parameters, strict=True))


def test_our_policy_and_buffer_with_stock_clip_ppo():
    actor = make_actor()
    batch = make_buffer(collect(actor), GRPOAdvantage()).sample()
    stock = ClipPPOLoss(actor, clip_epsilon=(0.2, 0.28), entropy_bonus=False)
    ours = AsymmetricClipPPOLoss(actor)
    torch.testing.assert_close(stock(batch)["loss_objective"], ours(batch)["loss_objective"])
    assert ours(batch)["kl_approx"].abs() < 1e-6 and ours(batch)["clip_fraction"] == 0
    take_a_step(stock, batch, actor)
    torch.testing.assert_close(stock(batch)["loss_objective"], ours(batch)["loss_objective"])


@pytest.mark.parametrize("loss_class", [ClipPPOLoss, A2CLoss, ReinforceLoss])
def test_our_policy_and_buffer_with_stock_losses_of_whole_decisions(loss_class):
    """A2C and REINFORCE score decisions, not tokens: the actor gives one log-probability per chunk."""
    actor, critic = make_actor("chunk"), make_critic()
    batch = make_buffer(collect(actor), GRPOAdvantage()).sample()
    assert batch["vla_action", "log_probs"].shape == batch.batch_size
    loss = loss_class(actor, critic)
    keys = {"action": ("vla_action", "tokens"), "value_target": "episode_return"}
    loss.set_keys(**keys)
    take_a_step(loss, batch, actor, critic)


def test_our_loss_on_whole_decisions():
    actor = make_actor("chunk")
    batch = make_buffer(collect(actor), GRPOAdvantage()).sample()
    take_a_step(AsymmetricClipPPOLoss(actor, ratio_level="chunk", entropy_coeff=0.01), batch, actor)


def update_with_gae(actor: OpenVLAActor, batch: TensorDictBase) -> None:
    critic = make_critic()
    GAE(gamma=0.99, lmbda=0.95, value_network=critic)(batch)
    loss = AsymmetricClipPPOLoss(actor, critic, ratio_level="action", entropy_coeff=0.01)
    before = loss(batch.reshape(-1))
    assert before["kl_approx"].abs() < 1e-6 and before["max_ratio"] == pytest.approx(1, abs=1e-5)
    take_a_step(loss, make_buffer(batch.reshape(-1).exclude("index")).sample(), actor, critic)


@pytest.mark.parametrize("layout", [make_env, partial(make_env, 2)])
def test_the_stock_collector_in_place_of_ours(layout):
    """PPO with GAE; no adapter in between."""
    actor = make_actor()
    collector = Collector(layout(), actor, frames_per_batch=24, total_frames=24, auto_register_policy_transforms=False)
    batches = list(collector)
    collector.shutdown()
    assert [batch.numel() for batch in batches] == [24]
    assert batches[0]["vla_action", "log_probs"].shape[-2:] == (CHUNK_SIZE, DIMS)
    update_with_gae(actor, batches[0])


def test_the_stock_collector_in_other_processes():
    actor = make_actor()
    collector = Collector(
        make_env,
        actor,
        backend="process",
        num_collectors=1,
        sync=True,
        frames_per_batch=24,
        total_frames=24,
    )
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    assert sum(batch.numel() for batch in batches) == 24
    update_with_gae(actor, batches[0])


def test_grpo_with_the_stock_collector():
    """Whole episodes, one after the other: `trajs_per_batch` with `traj_format="cat"`."""
    actor = make_actor()
    collector = Collector(
        make_env(4), actor, trajs_per_batch=8, traj_format="cat", frames_per_batch=24, total_frames=240,
        auto_register_policy_transforms=False,
    )  # fmt: skip
    batch = next(iter(collector)).clone()
    collector.shutdown()
    ends = batch["next", "done"] & (batch["collector", "traj_ids"].reshape(-1, 1) % 2 == 0)
    batch["next", "success"], batch["next", "reward"] = ends, ends.float()
    scored = GRPOAdvantage(group_keys=["task_id"]).inv(batch)
    assert scored["advantage"].abs().min() > 0
    take_a_step(AsymmetricClipPPOLoss(actor), scored, actor)


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
