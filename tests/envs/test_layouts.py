"""LiberoEnv under TorchRL: every layout keeps the specs and the choice of the episode, and stock PPO trains on it."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import Compose, EnvBase, ParallelEnv, RewardSum, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_vla.envs import InstructionFromTaskId, LiberoEnv, get_suite

pytestmark = [pytest.mark.simulator, pytest.mark.processes]

SUITE = "libero_spatial"
make = partial(LiberoEnv, SUITE, task_ids=[0, 1], image_size=16, max_episode_steps=12, fidelity="fast")


def _parallel(workers: int, **options: object) -> EnvBase:
    return ParallelEnv(workers, partial(make, **options), mp_start_method="spawn")


LAYOUTS = {
    "alone": lambda: make(),
    "batch": lambda: make(num_envs=2),
    "one slot, control step by control step, two cameras": lambda: make(
        num_envs=1, chunk_size=1, cameras=("agentview", "robot0_eye_in_hand"), proprio_format="quaternion"
    ),
    "transformed": lambda: TransformedEnv(make(num_envs=2), Compose(StepCounter(), RewardSum())),
    "serial": lambda: SerialEnv(2, make),
    "serial of batches": lambda: SerialEnv(2, partial(make, num_envs=2)),
    "parallel": lambda: _parallel(2),
    "parallel of batches": lambda: TransformedEnv(
        _parallel(2, num_envs=2, include_instruction=False), InstructionFromTaskId(SUITE)
    ),
}


@pytest.fixture(scope="module")
def layouts() -> Iterator[Callable[[str], EnvBase]]:
    """Makes each layout once: a worker takes seconds to start."""
    made: dict[str, EnvBase] = {}

    def layout(name: str) -> EnvBase:
        if name not in made:
            made[name] = LAYOUTS[name]()
        made[name].set_seed(0)
        return made[name]

    yield layout
    for env in made.values():
        env.close()


def _instructions(tensordict: TensorDict) -> list[str]:
    flat = tensordict.reshape(-1) if tensordict.batch_size else tensordict.unsqueeze(0)
    return [flat[index]["language_instruction"] for index in range(len(flat))]


def _zero_action(env: EnvBase, tensordict: TensorDict) -> TensorDict:
    return tensordict.set("action", env.action_spec.zero())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(layouts: Callable[[str], EnvBase], name: str) -> None:
    """Specs; task and initial state chosen through the tensordict; partial resets; the end of an episode."""
    env = layouts(name)
    check_env_specs(env)
    batch, count = env.batch_size, env.batch_size.numel()
    tasks = [task.instruction for task in get_suite(SUITE).tasks]

    chosen = TensorDict(
        {
            "task_id": torch.arange(count).view(*batch, 1) + 2,
            "init_state_id": torch.arange(count).view(*batch, 1) + 10,
        },
        batch_size=batch,
    )
    tensordict = env.reset(chosen.clone())
    assert torch.equal(tensordict["task_id"], chosen["task_id"])
    assert torch.equal(tensordict["init_state_id"], chosen["init_state_id"])
    assert _instructions(tensordict) == tasks[2 : 2 + count]

    steps = 12 if env.action_spec.shape == (*batch, 7) else 2
    for _ in range(steps):
        last, tensordict = env.step_and_maybe_reset(_zero_action(env, tensordict))
        assert torch.equal(last["next", "task_id"], chosen["task_id"])
        assert _instructions(last["next"]) == tasks[2 : 2 + count]
    assert last["next", "truncated"].all() and not last["next", "terminated"].any()
    # What follows by itself is the schedule's, not the last episode's choice.
    assert not tensordict["done"].any()
    assert (tensordict["task_id"] < 2).all() and (tensordict["init_state_id"] < 5).all()
    assert _instructions(tensordict) == [tasks[task_id] for task_id in tensordict["task_id"].flatten().tolist()]

    tensordict = env.step(_zero_action(env, tensordict))["next"].exclude("reward")
    if batch:
        before = tensordict.clone()
        mask = torch.zeros(*batch, 1, dtype=torch.bool)
        mask.view(-1)[-1] = True
        tensordict["_reset"] = mask
        tensordict["task_id"] = torch.where(mask, 7, tensordict["task_id"])
        tensordict["init_state_id"] = torch.where(mask, 8, tensordict["init_state_id"])
        after = env.reset(tensordict)
        assert after["task_id"].view(-1)[-1] == 7 and after["init_state_id"].view(-1)[-1] == 8
        kept, old = after.reshape(-1)[:-1], before.reshape(-1)[:-1]
        for key in ("task_id", "init_state_id", "num_control_steps", ("observation", "state")):
            assert torch.equal(kept[key], old[key])
        assert _instructions(after) == [*_instructions(before)[:-1], tasks[7]]


@pytest.mark.parametrize("layout", ["batch", "transformed", "serial", "parallel"])
def test_task_and_initial_state_are_chosen_by_keyword(layouts: Callable[[str], EnvBase], layout: str) -> None:
    env = layouts(layout)
    tensordict = env.reset(list_of_kwargs=[{"task_id": 4, "init_state_id": 3}, {"task_id": 6}])
    assert tensordict["task_id"].flatten().tolist() == [4, 6] and tensordict["init_state_id"][0].item() == 3
    tensordict = env.reset(task_id=5, init_state_id=2)
    assert tensordict["task_id"].flatten().tolist() == [5, 5]
    assert tensordict["init_state_id"].flatten().tolist() == [2, 2]


def test_workers_give_what_one_process_gives(layouts: Callable[[str], EnvBase]) -> None:
    """Same tasks, same initial states, same actions: same bits."""
    action = torch.rand(2, 8, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    outcomes = []
    for env in (layouts("batch"), layouts("parallel")):
        tensordict = env.reset(list_of_kwargs=[{"task_id": 0, "init_state_id": 1}, {"task_id": 1, "init_state_id": 1}])
        outcomes.append(env.step(tensordict.set("action", action.clone()))["next"].clone())
    for key in (("observation", "image"), ("observation", "state"), "reward", "num_control_steps"):
        assert torch.equal(outcomes[0][key], outcomes[1][key])


def test_skipping_a_worker_costs_nothing(layouts: Callable[[str], EnvBase]) -> None:
    """TorchRL masks whole workers; within one, slots that are done wait by themselves."""
    env = layouts("serial of batches")
    tensordict = _zero_action(env, env.reset())
    tensordict["_step"] = torch.tensor([[True, True], [False, False]])
    assert env.step(tensordict)["next", "num_control_steps"].flatten().tolist() == [8, 8, 0, 0]


def _actor_and_critic(env: EnvBase) -> tuple[ProbabilisticActor, ValueOperator]:
    state = ("observation", "state")
    actor = TensorDictModule(
        nn.Sequential(nn.Linear(8, 2 * 8 * 7), nn.Unflatten(-1, (8, 14)), NormalParamExtractor()),
        in_keys=[state],
        out_keys=["loc", "scale"],
    )
    policy = ProbabilisticActor(
        actor,
        in_keys=["loc", "scale"],
        spec=env.action_spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -1.0, "high": 1.0, "event_dims": 2},
        return_log_prob=True,
    )
    return policy, ValueOperator(nn.Linear(8, 1), in_keys=[state])


@pytest.mark.parametrize("layout", ["batch", "serial"])
def test_stock_ppo_trains_on_it(layout: str) -> None:
    """A Gaussian actor on the robot's state, TorchRL's collector, GAE and clipped loss; nothing of ours but the env."""
    torch.manual_seed(0)
    env = LAYOUTS[layout]()
    policy, critic = _actor_and_critic(env)
    collector = Collector(env, policy, frames_per_batch=8, total_frames=16, auto_register_policy_transforms=True)
    loss_module = ClipPPOLoss(policy, critic)
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=1e-2)
    before = [parameter.clone() for parameter in policy.parameters()]
    batches = 0
    for batch in collector:
        batches += 1
        assert batch.batch_size == (2, 4) and batch["action"].shape == (2, 4, 8, 7)
        # Two decisions of 8 and 4 control steps per episode.
        assert batch["next", "num_control_steps"].flatten().tolist() == [8, 4, 8, 4] * 2
        assert batch["next", "done"].flatten().tolist() == [False, True] * 4
        advantage(batch)
        losses = loss_module(batch.reshape(-1))
        loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    collector.shutdown()
    assert batches == 2
    changed = zip(before, policy.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in changed)
