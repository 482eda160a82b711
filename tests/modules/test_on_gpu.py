"""What only a GPU shows: one kernel for all copies of adapters, and decisions that wait for nothing."""

from __future__ import annotations

import pytest
import torch
from small_openvla import decided_model, small_openvla_config
from tensordict import TensorDict

from torchrl_vla.modules import ActionTokenizer, NonFiniteError, OpenVLAProcessor, build_tokenizer, make_actor
from torchrl_vla.modules.openvla.linear import Adapters, copy_adapters
from torchrl_vla.modules.openvla.weight_watch import AdapterCopier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TASKS = {0: "open the top drawer"}
DTYPES = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize(("trained", "computed"), DTYPES)
def test_one_kernel_copies_as_many_do(trained: torch.dtype, computed: torch.dtype) -> None:
    pytest.importorskip("triton")

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(trained)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="cuda", dtype=computed)

    downs, ups = [random(32, 1000), random(7, 1000)], [random(3001, 32), random(50, 7)]
    fused, expected = (
        Adapters(downs, ups, (0, 3001), (0.37, 2.0), zeros(40, 1000), zeros(3051, 1040)) for _ in range(2)
    )
    AdapterCopier([fused])()
    copy_adapters(expected)
    assert torch.equal(fused.down, expected.down) and torch.equal(fused.extended, expected.extended)
    assert fused.extended.any()


def test_a_decision_waits_for_nothing_and_the_next_one_says_what_was_wrong() -> None:
    config = small_openvla_config()
    model = decided_model(config).cuda()
    tokenizer = build_tokenizer(TASKS.values(), vocab_size=config.tokenizer_vocab_size)
    processor = OpenVLAProcessor(tokenizer, ActionTokenizer(), image_size=28, backend="fast")
    actor = make_actor(model, processor, instructions=TASKS).cuda()
    observation = TensorDict(image=torch.zeros(3, 3, 32, 32, dtype=torch.uint8), state=torch.zeros(3, 8))
    data = TensorDict(observation=observation, task_id=torch.zeros(3, 1, dtype=torch.int64), batch_size=[3]).cuda()
    actor(data.copy())
    with torch.no_grad():
        model.language_model.model.norm.weight[3] = float("nan")
    torch.cuda.set_sync_debug_mode("error")
    try:
        actor(data.copy())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(NonFiniteError, match="logits are not finite in 3 of 3 decisions"):
        actor.backbone.raise_errors()
    actor.backbone.raise_errors()  # said once
    data["task_id"] += 1
    with pytest.raises(ValueError, match=r"task_id \[1\] have no instruction"):
        actor.get_dist(data.copy())
        actor.backbone.raise_errors()
