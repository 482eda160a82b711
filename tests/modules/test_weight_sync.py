"""What TorchRL's collectors send reaches a policy that is accelerated: it acts with what was learned."""

from __future__ import annotations

import pytest
import torch
from small_openvla import decided_model, small_openvla_config
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_vla.modules import ActionTokenizer, OpenVLAActor, OpenVLAProcessor, build_tokenizer, make_actor
from torchrl_vla.modules.openvla import add_lora

TOKENS, LOG_PROBS = ("vla_action", "tokens"), ("vla_action", "log_probs")
TASKS = {0: "open the top drawer"}


class StillEnv(EnvBase):
    """One picture, for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_spec = Composite(
            observation=Composite(
                image=Bounded(0, 255, (3, 32, 32), dtype=torch.uint8), state=Unbounded((8,), dtype=torch.float32)
            ),
            task_id=Unbounded((1,), dtype=torch.int64),
        )
        self.action_spec = Bounded(-1.0, 1.0, (2, 7))
        self.reward_spec = Unbounded((1,))
        self.done_spec = Composite(
            done=Categorical(2, (1,), dtype=torch.bool), terminated=Categorical(2, (1,), dtype=torch.bool)
        )

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: object) -> TensorDictBase:
        return self.observation_spec.zero().update(self.full_done_spec.zero())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._reset(None).update(self.full_reward_spec.zero())

    def _set_seed(self, seed: int | None) -> None:
        pass


def accelerated_actor() -> OpenVLAActor:
    config = small_openvla_config()
    model = add_lora(decided_model(config), rank=4)
    tokenizer = build_tokenizer(TASKS.values(), vocab_size=config.tokenizer_vocab_size)
    processor = OpenVLAProcessor(tokenizer, ActionTokenizer(), image_size=28, backend="fast")
    actor = make_actor(model, processor, instructions=TASKS).eval()
    model.accelerate(compile_layers=False)
    return actor


def learn(actor: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def error(actor: OpenVLAActor, batch: TensorDictBase) -> float:
    """Mean |log ratio| of the policy to the one that acted."""
    batch = batch.clone().reshape(-1)
    with torch.no_grad():
        return (actor.get_dist(batch).log_prob(batch[TOKENS]) - batch[LOG_PROBS]).abs().mean().item()


def test_a_collector_updates_a_policy_of_its_own() -> None:
    learner, rollout = accelerated_actor(), accelerated_actor()
    options = {"frames_per_batch": 2, "total_frames": 8, "auto_register_policy_transforms": False}
    collector = Collector(StillEnv(), rollout, **options)
    try:
        batches = iter(collector)
        assert error(learner, next(batches)) < 1e-5
        learn(learner)
        assert error(learner, next(batches)) > 0.1
        collector.update_policy_weights_(TensorDict.from_module(learner).data)
        assert error(learner, next(batches)) < 1e-5
    finally:
        collector.shutdown()


@pytest.mark.processes
def test_collectors_in_other_processes_act_with_what_was_learned() -> None:
    """Through shared memory, of which the worker's parameters tell nothing."""
    learner = accelerated_actor()
    collector = MultiSyncCollector([StillEnv], learner, frames_per_batch=2, total_frames=8)
    try:
        batches = iter(collector)
        assert error(learner, next(batches)) < 1e-5
        learn(learner)
        collector.update_policy_weights_()
        next(batches)  # may have been begun before
        assert error(learner, next(batches)) < 1e-5
    finally:
        collector.shutdown()
