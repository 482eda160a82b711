from __future__ import annotations

import pytest
import torch

from torchrl_vla.checkpoints.memory_estimate import estimate_memory
from torchrl_vla.modules.openvla import OpenVLA, OpenVLAConfig

pytestmark = pytest.mark.slow

SEVEN_B = OpenVLAConfig.seven_b()


@pytest.fixture(scope="module")
def lora_step():
    return estimate_memory(SEVEN_B, batch_size=1, training=True, recompute=1.0)


def test_7b_weights_are_counted_exactly(lora_step) -> None:
    with torch.device("meta"):
        found = sum(p.numel() for p in OpenVLA(SEVEN_B).parameters())
    adapters = 109_126_400
    assert lora_step.weights == 2 * found + 4 * adapters
    assert lora_step.gradients == 4 * adapters and lora_step.optimizer == 8 * adapters


def test_7b_total_is_what_was_measured(lora_step) -> None:
    """One H100, LoRA-32, one decision at a time with checkpointing: a peak of 16.1 GiB was measured."""
    assert lora_step.total / 2**30 == pytest.approx(16.1, rel=0.05)


def test_4bit_weights_take_a_quarter() -> None:
    plain, quantised = (
        estimate_memory(SEVEN_B, batch_size=1, training=False, load_in_4bit=four) for four in (False, True)
    )
    # Embeddings and the head (131 million each) and what is no linear layer stay in bfloat16.
    linear = plain.weights - 2 * 2 * 32064 * 4096
    assert quantised.weights == pytest.approx(plain.weights - linear * (1 - (0.5 + 4 / 64) / 2), rel=1e-3)
    assert plain.activations == quantised.activations


@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_activations_are_those_of_a_real_step(recompute: float) -> None:
    """Against what autograd holds after a real forward pass, and linear in the batch."""
    config = OpenVLAConfig.tiny()
    options = dict(training=True, dtype=torch.float32, use_lora=False, recompute=recompute)
    one, four = (estimate_memory(config, batch_size=size, **options).activations for size in (1, 4))
    assert 2.5 < four / one <= 4.1
    if recompute:
        half = estimate_memory(config, batch_size=1, **{**options, "recompute": 0.5}).activations
        assert one < half < estimate_memory(config, batch_size=1, **{**options, "recompute": 0.0}).activations
        return
    model = OpenVLA(config).train()
    held: dict[int, torch.UntypedStorage] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage
        return tensor

    prompt = torch.full((4, 48), 3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.rand(4, 6, 126, 126), prompt, None, torch.zeros(4, 8)).action_logits.sum()
    assert four == pytest.approx(sum(storage.nbytes() for storage in held.values()), rel=0.15)


def test_a_frozen_backbone_keeps_no_activations_of_its_own() -> None:
    config = OpenVLAConfig.tiny(use_proprio=False)
    options = dict(batch_size=2, dtype=torch.float32)
    frozen = estimate_memory(config, training=True, freeze_vla_backbone=True, **options)
    assert frozen.gradients == frozen.optimizer == 0
    assert frozen.activations == estimate_memory(config, training=False, **options).activations


def test_decoding_one_after_the_other_needs_its_cache() -> None:
    """Keys and values of 32 layers in bfloat16, of 256 patches, 48 prompt tokens, BOS's place among them, the appended
    token's, and 6 of 7 action tokens, rounded up to 8."""
    options = dict(batch_size=4, training=False)
    parallel, autoregressive = (
        estimate_memory(SEVEN_B, autoregressive=each, **options).activations for each in (False, True)
    )
    cache = 4 * 32 * 2 * 312 * 4096 * 2
    assert cache < autoregressive < cache + 1.1 * parallel
