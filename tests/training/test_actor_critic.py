"""A value head on the policy's hidden state, and the policy that a run began with."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_vla.checkpoints.policy import Policy, build_policy
from torchrl_vla.modules.openvla.lora import add_lora
from torchrl_vla.training.actor_critic import Critic
from torchrl_vla.training.reference import reference_policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    return build_policy("tiny", temperature=1.0)


def observe(count: int = 3) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)
    observation = TensorDict({"image": image, "state": torch.rand(count, 8, generator=generator)}, [count])
    return TensorDict({"observation": observation, "language_instruction": ["pick up the bowl"] * count}, [count])


@torch.no_grad()
def test_actions_and_values_are_of_one_pass(policy: Policy):
    critic = Critic(policy.actor, policy.model.config.hidden_size)
    passes: list[int] = []
    hook = policy.actor.backbone.register_forward_hook(lambda *_: passes.append(1))
    torch.manual_seed(2)
    out = critic.rollout(observe())
    assert passes == [1]
    hook.remove()
    torch.manual_seed(2)
    alone = policy.actor(observe())
    assert torch.equal(out["vla_action", "tokens"], alone["vla_action", "tokens"])
    assert torch.equal(out["vla_action", "log_probs"], alone["vla_action", "log_probs"])
    hidden = policy.actor.backbone(observe())["vla_action", "hidden"]
    torch.testing.assert_close(out["state_value"], critic.value_head(hidden))
    assert out["state_value"].shape == (3, 1) and out["state_value"].std() > 0


def test_the_value_head_moves_alone(policy: Policy):
    critic = Critic(policy.actor, policy.model.config.hidden_size).to(torch.device("meta"))
    assert {p.device.type for p in critic.value_operator.parameters()} == {"meta"}
    assert {p.device.type for p in policy.model.parameters()} == {"cpu"}


@pytest.mark.parametrize("use_lora", [False, True])
def test_an_error_in_the_references_forward_leaves_the_learned_weights(use_lora: bool):
    torch.manual_seed(0)
    model = build_policy("tiny", temperature=1.0).model
    if use_lora:
        add_lora(model, rank=2)
    reference = reference_policy(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in learned:
            parameter += 1.0
    expected = [parameter.clone() for parameter in learned]
    with pytest.raises(ZeroDivisionError), reference():
        assert use_lora or not torch.equal(learned[0], expected[0])
        raise ZeroDivisionError
    assert all(map(torch.equal, learned, expected))
