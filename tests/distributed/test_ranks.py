"""Several real processes that train together come to what one process comes to."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import several
import torch
import torch.multiprocessing as mp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_swap import STATE, Backbone
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_vla.collectors import EpisodePlan
from torchrl_vla.config import PPOConfig
from torchrl_vla.distributed import OneProcess, SharedBuffer, SharedCollector, join_ranks
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.actor import ActionTokenSampler, OpenVLAActor
from torchrl_vla.objectives import AsymmetricClipPPOLoss, EstimateAdvantage, GRPOAdvantage
from torchrl_vla.recipes.grpo import learn, make_buffer
from torchrl_vla.training.logging import SilentLogger
from torchrl_vla.training.optimizer_step import OptimizerStep
from torchrl_vla.training.progress import RunProgress

CHUNK, DIMS = 2, 7


def make_actor() -> OpenVLAActor:
    torch.manual_seed(0)

    backbone = TensorDictModule(
        Backbone(), in_keys=[STATE], out_keys=[("vla_action", "logits"), ("vla_action", "hidden")]
    )
    return OpenVLAActor(
        backbone, ActionTokenSampler(ActionTokenizer(), chunk_size=CHUNK, temperature=1.6, log_prob_level="token")
    )


def train(kind: str, slots: int = 3) -> dict[str, Any]:
    """Three updates in however many processes there are; what one of them has at the end."""
    with join_ranks("cpu") as ranks:
        actor = make_actor()
        critic, advantage = None, GRPOAdvantage()
        if kind == "gae":
            critic = ValueOperator(nn.Linear(2 * DIMS, 1), in_keys=[STATE])
            advantage = EstimateAdvantage(GAE(gamma=0.99, lmbda=0.95, value_network=None))
            acting: Any = TensorDictSequential(actor.backbone, actor[-1], critic)
        else:
            acting = actor
        if kind == "stock":
            loss: Any = ClipPPOLoss(actor, None, entropy_bonus=False, clip_epsilon=(0.2, 0.28), functional=False)
            loss.set_keys(action=("vla_action", "tokens"), sample_log_prob=("vla_action", "log_probs"))
        else:
            loss = AsymmetricClipPPOLoss(actor, critic, entropy_coeff=0.01)
        parameters = list(dict.fromkeys(loss.parameters()))
        config = PPOConfig(
            total_timesteps=10**6, n_steps=1, n_epochs=2, batch_size=7, traj_split_num=1, traj_mini_batch_size=5,
            val_interval=0, max_grad_norm=0.5,
        )  # fmt: skip
        plans = EpisodePlan.stream({0: range(9)}, groups=2, group_size=4, seed=0)
        first_three = [next(plans) for _ in range(3)]
        env = ToyTrackingEnv(slots, chunk_size=CHUNK, action_dim=DIMS, max_decisions=3)
        env.success_tol = 1.25  # some episodes succeed by chance, so that groups have both outcomes
        collector = SharedCollector(env, acting, first_three, seed=5, ranks=ranks)
        step = OptimizerStep(
            loss, torch.optim.AdamW(parameters, lr=1e-3), config, report=lambda text: None, ranks=ranks
        )  # fmt: skip
        buffer = make_buffer(advantage) if ranks.size == 1 else SharedBuffer(advantage, ranks=ranks)
        logger, progress = SilentLogger(Path()), RunProgress()
        torch.manual_seed(1)
        learn(config, collector, buffer, step, progress, logger, advantage=advantage, ranks=ranks)
        return {"weights": nn.utils.parameters_to_vector(parameters).detach(), "rows": logger.rows}


def comparable(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if "time" not in name} for row in rows]


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "size"), [("grpo", 2), ("grpo", 3), ("gae", 2), ("stock", 2)])
def test_the_result_is_that_of_one_process(kind: str, size: int, tmp_path: Path) -> None:
    alone = train(kind)
    assert alone["rows"][0]["rollout/num_trajectories"] == 8 and 0 < alone["rows"][0]["rollout/success_rate"] < 1
    together = several.run(size, train, tmp_path, kind)
    for other in together:
        assert torch.equal(other["weights"], together[0]["weights"]), "equal to the bit on all ranks"
        for row, expected in zip(comparable(other["rows"]), comparable(alone["rows"]), strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=2e-6, nan_ok=True)
    start = nn.utils.parameters_to_vector(make_actor().parameters())
    moved = (alone["weights"][: len(start)] - start).abs().max()
    assert moved > 1e-3
    torch.testing.assert_close(together[0]["weights"], alone["weights"], rtol=0, atol=1e-5)


def gradient(shares: list[int]) -> torch.Tensor:
    """The gradient of one mini-batch of 23 decisions, of which each process has its share; 0 is a share too."""
    with join_ranks("cpu") as ranks:
        actor = make_actor()
        torch.manual_seed(2)
        with torch.no_grad():
            data = actor(TensorDict({"observation": {"state": torch.randn(23, 2 * DIMS)}}, [23]))
        data["vla_action", "log_probs"] += 0.3 * torch.randn(23, CHUNK, DIMS)
        data["advantage"], data["mask"] = torch.randn(23, 1), torch.rand(23, CHUNK) > 0.2
        data = data.exclude(("vla_action", "logits"), ("vla_action", "hidden"))
        mine = data.split(shares)[ranks.rank] if ranks.size > 1 else data
        config = PPOConfig(batch_size=4, traj_split_num=1, max_grad_norm=1e9)
        step = OptimizerStep(
            AsymmetricClipPPOLoss(actor, entropy_coeff=0.01), torch.optim.SGD(actor.parameters(), lr=0.0), config,
            report=lambda text: None, ranks=ranks,
        )  # fmt: skip
        step(mine)
        return torch.cat([parameter.grad.flatten() for parameter in step.parameters])


@pytest.mark.processes
def test_the_gradient_of_uneven_and_empty_shares(tmp_path: Path) -> None:
    alone = gradient([23])
    for other in several.run(3, gradient, tmp_path, [15, 8, 0]):
        assert (other - alone).abs().max() <= 1e-6 * alone.abs().max()


def fail_in_one() -> str:
    """What ends each process when the first one's rollout fails."""
    with join_ranks("cpu") as ranks:

        class Failing(ToyTrackingEnv):
            def _step(self, tensordict: Any) -> Any:
                if ranks.rank == 0:
                    raise RuntimeError("the simulator broke")
                return super()._step(tensordict)

        collector = SharedCollector(
            Failing(2, chunk_size=CHUNK, action_dim=DIMS, max_decisions=3), make_actor(), ranks=ranks, seed=0
        )
        try:
            collector.collect(EpisodePlan([(0, 1), (0, 2)], group_size=2))
        except BaseException as error:
            return repr(error)
        return "nothing"


@pytest.mark.processes
def test_a_failure_in_one_process_ends_all(tmp_path: Path) -> None:
    first, second = several.run(2, fail_in_one, tmp_path)
    assert first == "RuntimeError('the simulator broke')" and second == "SystemExit(1)"


def wait_for_ever(folder: Path) -> None:
    """A sum that a killed process never adds to."""
    with join_ranks("cpu") as ranks:
        (folder / f"pid-{ranks.rank}").write_text(str(os.getpid()))
        ranks.sum(1)
        if ranks.rank == 1:
            time.sleep(600)
        ranks.sum(1)


@pytest.mark.processes
def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    work = context.Process(target=several.run, args=(2, wait_for_ever, tmp_path, tmp_path))
    work.start()
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"pid-{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    work.join(60)
    assert not work.is_alive() and work.exitcode != 0


def test_one_process_is_whole() -> None:
    ranks = OneProcess()
    tensor = torch.ones(2)
    ranks.sum_([tensor])
    assert (ranks.share("abc"), ranks.sum(3), ranks.gather(4), ranks.is_first) == ("abc", 3, [4], True)
    assert torch.equal(tensor, torch.ones(2))
