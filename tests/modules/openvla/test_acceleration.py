"""The fast paths give what the plain one gives: fused, compiled and recomputed layers, copied adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchrl_vla.modules.openvla import OpenVLA
from torchrl_vla.modules.openvla.linear import LinearWeights, lora_linear, read_group, read_linear
from torchrl_vla.modules.openvla.lora import add_lora, without_adapters

from .conftest import random_model, small_config

COMPILE = torch.compile
EMPTY = 3
IDS = torch.tensor([[1, 10, 11, EMPTY], [1, 12, 13, EMPTY], [1, 14, EMPTY, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time as on a GPU, the code generation left out."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: COMPILE(f, backend="aot_eager", **options))
    torch._dynamo.reset()


def adapted(**options: object) -> OpenVLA:
    """A model whose adapters matter."""
    model = add_lora(random_model(small_config()), rank=4, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(batch: int, *, padded: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(1)
    ids, mask = (IDS, MASK) if padded else (IDS[:2], None)
    rows = torch.arange(batch) % len(ids)
    return torch.randn(batch, 6, 28, 28), ids[rows], None if mask is None else mask[rows], torch.randn(batch, 8)


def logits_and_gradients(model: OpenVLA, batch: int = 3, *, padded: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(*inputs(batch, padded=padded)).action_logits
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True], ids=["one_length", "padded"])
@pytest.mark.parametrize("make", [adapted, lambda: random_model(small_config())], ids=["adapters", "plain"])
def test_compiled_layers_give_the_same(make: Callable[[], OpenVLA], padded: bool) -> None:
    expected = [logits_and_gradients(make(), batch, padded=padded) for batch in (3, 2, 1)]
    model = make()
    model.accelerate()
    for batch, plain in zip((3, 2, 1), expected, strict=True):
        found = logits_and_gradients(model, batch, padded=padded)
        torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs(3, padded=padded)).action_logits, expected[0][0], atol=1e-6, rtol=1e-5)


def test_one_compilation_serves_all_layers_and_batch_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    model = adapted()
    model.accelerate(compile_layers=False)
    for stack in model._stacks:
        stack._block = COMPILE(stack._eager.__call__, backend=counter, fullgraph=True)
    for batch in (2, 3, 5):
        logits_and_gradients(model, batch)
    assert counter.frame_count == 3  # a DINOv2, a SigLIP and a Llama layer


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_recomputed_layers_give_the_same_gradients(share: float) -> None:
    expected = logits_and_gradients(adapted())
    model = adapted()
    model.accelerate()
    model.gradient_checkpointing_enable(share)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        found = logits_and_gradients(model)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="share must be from 0"):
        model.gradient_checkpointing_enable(1.5)


def test_fused_layers_keep_their_parameters() -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.accelerate(compile_layers=False)
    torch.testing.assert_close(dict(model.named_parameters()), before, atol=0, rtol=0)
    attention = model.language_model.model.layers[0].self_attn
    (group,) = read_group([attention.q_proj, attention.k_proj, attention.v_proj])
    assert isinstance(group, LinearWeights) and group.weight.shape == (48, 16)
    assert group.weight.data_ptr() == attention.q_proj.get_base_layer().weight.data_ptr()
    assert len(read_group([attention.q_proj, attention.o_proj])) == 2  # other inputs, other storage


def test_layers_that_learn_are_not_fused() -> None:
    model = random_model(small_config())
    model.accelerate(compile_layers=False)
    attention = model.language_model.model.layers[0].self_attn
    assert len(read_group([attention.q_proj, attention.k_proj, attention.v_proj])) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_bf16_copies_follow_the_adapters(fused: bool) -> None:
    """What is computed with is what an optimizer step, or loading a checkpoint, made of the float32 adapters."""
    model = adapted().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    model.accelerate(compile_layers=False)
    layer = model.language_model.model.layers[0]

    def copies_are_right() -> bool:
        adapters = [one for stack in model._stacks for one in stack.adapters()]
        pairs = [(one.down, torch.cat(one.downs)) for one in adapters] + [
            (one.up, torch.block_diag(*one.ups)) for one in adapters
        ]
        return len(adapters) > 0 and all(torch.equal(copy, kept.to(torch.bfloat16)) for copy, kept in pairs)

    state = inputs(2, padded=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=fused)
    model(*state).action_logits.square().mean().backward()
    assert copies_are_right()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    optimizer.step()
    assert not copies_are_right()
    with torch.no_grad():
        model(*state)
        assert copies_are_right()
        layer.self_attn.v_proj.lora_B["default"].weight.add_(1)
        assert not copies_are_right()
        model(*state)
    assert copies_are_right()


def test_adapters_can_be_left_out_of_an_accelerated_model() -> None:
    model = adapted()
    expected = random_model(small_config())(*inputs(2, padded=False)).action_logits
    model.accelerate()
    with torch.no_grad():
        with_adapters = model(*inputs(2, padded=False)).action_logits
        with without_adapters(model):
            torch.testing.assert_close(model(*inputs(2, padded=False)).action_logits, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(model(*inputs(2, padded=False)).action_logits, with_adapters)
    assert (with_adapters - expected).abs().max() > 1e-3


def test_adapted_layer_by_hand() -> None:
    """W = [[1, 2]], A = [[3, 4]], B = [[5]], scale 0.5, x = (1, 1): 3 + 0.5 * 5 * 7 = 20.5."""
    x = torch.tensor([[1.0, 1.0]], requires_grad=True)
    weight, down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]])
    downs, ups = [down.clone().requires_grad_()], [up.clone().requires_grad_()]
    output, low = lora_linear(x, weight, None, down, up, 0.5, downs, ups, [0])
    assert (output.item(), low.item()) == (20.5, 7.0)
    output.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1 + 0.5 * 15, 2 + 0.5 * 20]]))
    torch.testing.assert_close(downs[0].grad, torch.tensor([[2.5, 2.5]]))
    torch.testing.assert_close(ups[0].grad, torch.tensor([[3.5]]))


def test_adapted_layer_passes_torchs_own_operator_checks() -> None:
    x, weight, bias = torch.randn(2, 3, 4, requires_grad=True), torch.randn(6, 4), torch.randn(6)
    downs = [torch.randn(2, 4, requires_grad=True) for _ in range(2)]
    ups = [torch.randn(3, 2, requires_grad=True) for _ in range(2)]
    up = torch.block_diag(*ups).detach()
    torch.library.opcheck(lora_linear, (x, weight, bias, torch.cat(downs).detach(), up, 0.5, downs, ups, [0, 3]))


def test_dropout_in_adapters_is_left_to_peft() -> None:
    model = adapted(dropout=0.5)
    layer = model.language_model.model.layers[0].self_attn.q_proj
    assert isinstance(read_linear(layer.train()), torch.nn.Module)
    assert isinstance(read_linear(layer.eval()), LinearWeights)
