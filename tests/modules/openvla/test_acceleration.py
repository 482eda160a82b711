"""The fast paths give what the plain one gives: fused, compiled and recomputed layers, copied adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_openvla import random_model, small_config
from torch import Tensor
from torch.nn import functional as F

from torchrl_vla.modules.openvla import OpenVLA
from torchrl_vla.modules.openvla.language import Prompt, arrange_prompt, decode_bidirectional, sequence_mask
from torchrl_vla.modules.openvla.linear import (
    Adapters,
    LinearWeights,
    fuse_storage,
    linear,
    read_group,
    read_linear,
)
from torchrl_vla.modules.openvla.lora import add_lora, merge_lora, without_adapters

pytestmark = pytest.mark.compile

COMPILE = torch.compile
EMPTY = 3
IDS = torch.tensor([[1, 10, 11, EMPTY], [1, 12, 13, EMPTY], [1, 14, EMPTY, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.fixture(autouse=True)
def _no_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time as on a GPU, the code generation left out."""
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, options: COMPILE(f, backend="aot_eager", fullgraph=True))


def adapted(**options: object) -> OpenVLA:
    """A model whose adapters matter."""
    model = add_lora(random_model(small_config()), rank=4, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def _is_copied(one: Adapters) -> bool:
    """The copies are the adapters in bfloat16, scaled, and zero wherever they only fill up."""
    assert one.down is not None and one.extended is not None
    rank, beside = sum(len(down) for down in one.downs), one.extended[:, one.down.shape[1] :]
    ups = torch.block_diag(*(up * scale for up, scale in zip(one.ups, one.scales, strict=True)))
    return (
        torch.equal(one.down[:rank], torch.cat(one.downs).bfloat16())
        and torch.equal(beside[:, :rank], ups.bfloat16())
        and not one.down[rank:].any()
        and not beside[:, rank:].any()
    )


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


@pytest.mark.parametrize(
    ("make", "padded", "batches"),
    [(adapted, False, (3, 2, 1)), (adapted, True, (3,)), (lambda: random_model(small_config()), False, (3,))],
    ids=["adapters", "adapters_padded", "plain"],
)
def test_compiled_layers_give_the_same(make: Callable[[], OpenVLA], padded: bool, batches: tuple[int, ...]) -> None:
    expected = [logits_and_gradients(make(), batch, padded=padded) for batch in batches]
    model = make()
    model.accelerate()
    for batch, plain in zip(batches, expected, strict=True):
        found = logits_and_gradients(model, batch, padded=padded)
        torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs(3, padded=padded)).action_logits, expected[0][0], atol=1e-6, rtol=1e-5)


def test_one_compilation_serves_all_layers_and_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, options: COMPILE(f, backend=counter, fullgraph=True))
    model = adapted()
    model.accelerate()
    for batch in (2, 3, 5):
        logits_and_gradients(model, batch)
    assert counter.frame_count == 4  # a DINOv2, a SigLIP and a Llama layer, and the last one of some positions


def test_a_compiled_rollout_rounds_as_its_update_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, with code of the compiler: log-probabilities that differed would be taken for a changed policy."""
    monkeypatch.setattr(torch, "compile", COMPILE)
    torch._dynamo.reset()
    model = adapted().bfloat16()
    stack = model.language_model.stack
    x = torch.randn(2, 12, model.config.hidden_size, dtype=torch.bfloat16)
    cos, sin = model.language_model.model.rotary_emb(x, torch.arange(12)[None])
    expected = stack(x, cos, sin, None).detach()
    stack.accelerate(compile_layers=True)
    with torch.no_grad():
        rollout = stack(x, cos, sin, None)
    update = stack(x, cos, sin, None)
    assert update.requires_grad
    assert torch.equal(update, rollout)
    torch.testing.assert_close(rollout, expected, atol=0.1, rtol=0.02)


def test_recomputed_layers_give_the_same_gradients() -> None:
    expected = logits_and_gradients(adapted())
    model = adapted()
    model.accelerate()
    kept = []
    for share in (0.0, 0.5, 1.0):
        model.gradient_checkpointing_enable(share)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            found = logits_and_gradients(model)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        kept.append(sum(sizes))
    assert kept[0] > kept[1] > kept[2]
    with pytest.raises(ValueError, match="share must be from 0"):
        model.gradient_checkpointing_enable(1.5)


def test_fused_layers_keep_their_parameters() -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.accelerate(compile_layers=False)
    torch.testing.assert_close(dict(model.named_parameters()), before, atol=0, rtol=0)
    attention = model.language_model.model.layers[0].self_attn
    (group,) = read_group([attention.q_proj, attention.k_proj, attention.v_proj], fused=True)
    assert isinstance(group, LinearWeights) and group.weight.shape == (48, 16)
    assert group.weight.data_ptr() == attention.q_proj.get_base_layer().weight.data_ptr()
    assert len(read_group([attention.q_proj, attention.o_proj], fused=True)) == 2  # other inputs, other storage


def test_layers_that_learn_are_not_fused() -> None:
    model = random_model(small_config())
    model.accelerate(compile_layers=False)
    attention = model.language_model.model.layers[0].self_attn
    assert len(read_group([attention.q_proj, attention.k_proj, attention.v_proj], fused=True)) == 3


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
        return len(adapters) == 2 * 4 + 3 * 4 + 3 * 4 and all(_is_copied(one) for one in adapters)

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


@pytest.mark.parametrize("compile_layers", [False, True])
def test_merging_into_an_accelerated_model_adds_the_adapters_once(compile_layers: bool) -> None:
    model = adapted()
    model.accelerate(compile_layers=compile_layers)
    with torch.no_grad():
        expected = model(*inputs(3, padded=False)).action_logits
        merge_lora(model)
        torch.testing.assert_close(model(*inputs(3, padded=False)).action_logits, expected, atol=1e-5, rtol=1e-4)


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
    down, up = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]])
    downs, ups = [down.clone().requires_grad_()], [up.clone().requires_grad_()]
    adapters = Adapters(downs, ups, (0,), (0.5,), down, torch.tensor([[1.0, 2.0, 2.5]]))
    output = linear(x, LinearWeights(torch.tensor([[1.0, 2.0]]), None, adapters))
    assert output.item() == 20.5
    output.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1 + 0.5 * 15, 2 + 0.5 * 20]]))
    torch.testing.assert_close(downs[0].grad, torch.tensor([[2.5, 2.5]]))
    torch.testing.assert_close(ups[0].grad, torch.tensor([[3.5]]))


@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj")])
def test_one_product_for_layers_of_which_some_have_adapters(names: tuple[str, ...]) -> None:
    """Of other ranks than the alignment, of other scales; against each layer through peft, in float64."""
    model = adapted(target_modules=list(names)).double()
    attention = model.language_model.model.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    modules[0].scaling["default"] = 0.3
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    weighting = torch.randn(2, 5, 48, dtype=torch.float64)
    trained = [x, *(p for module in modules for p in module.parameters() if p.requires_grad)]
    expected = torch.cat([module(x) for module in modules], dim=-1)
    gradients = torch.autograd.grad((expected * weighting).sum(), trained)
    fuse_storage(modules)
    (group,) = read_group(modules, fused=True)
    found = linear(x, group)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * weighting).sum(), trained), gradients)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, group), expected)
    # peft still computes the same from its part of the storage.
    torch.testing.assert_close(torch.cat([module(x) for module in modules], dim=-1), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_wider_padding_changes_nothing(implementation: str) -> None:
    """As on a GPU, where no column of padding is taken away: 12 more of them, on the side of the prompt or not."""
    model = random_model(attn_implementation=implementation)
    pixels, ids, mask, proprio = inputs(3, padded=True)
    expected = model(pixels, ids, mask, proprio).action_logits
    wide, real = F.pad(ids, (0, 12), value=9), F.pad(mask, (0, 12))
    prompt = arrange_prompt(wide, real, EMPTY, 0)
    assert prompt.rest.shape[1] == 3  # on the CPU they go
    rest = F.pad(prompt.rest, (12, 0), value=9)
    kept = Prompt(prompt.first, rest, F.pad(torch.ones_like(prompt.rest, dtype=torch.bool), (12, 0)))
    if prompt.mask is not None:
        kept = kept._replace(mask=F.pad(prompt.mask, (12, 0)))
    embeds = model.embed(kept, model.encode_images(pixels), proprio, num_action_slots=model.config.num_action_tokens)
    slots = model.config.num_action_tokens
    patches = embeds.shape[1] - 1 - rest.shape[1] - slots - 1
    hidden = decode_bidirectional(model.language_model, embeds, sequence_mask(kept, patches, slots + 1))
    found = model._action_logits(hidden[:, -slots - 2 : -2])
    torch.testing.assert_close(found.view(expected.shape), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_the_last_layer_computes_the_wanted_positions_only(implementation: str, padded: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = random_model(attn_implementation=implementation)
    embeds, mask = torch.randn(2, 40, model.config.hidden_size), None
    if padded:
        mask = torch.ones(2, 40, dtype=torch.bool)
        mask[1, 3:7] = False
    operations = []
    for rows in (None, (-9, -2)):
        with FlopCounterMode(display=False) as counter:
            hidden = decode_bidirectional(model.language_model, embeds, mask, rows)
        operations.append((hidden, counter.get_total_flops()))
    (full, most), (some, fewer) = operations
    torch.testing.assert_close(some, full[:, -9:-2], atol=1e-6, rtol=1e-5)
    assert fewer < most


def through_transformers(model: OpenVLA, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Seven greedy tokens and their logits through transformers' own model and cache."""
    prompt, features = model._inputs(pixels, ids, mask, None)
    embeds = model.embed(prompt, features, num_action_slots=0)
    real = sequence_mask(prompt, embeds.shape[1] - 1 - prompt.rest.shape[1], 0)
    assert real is not None
    step: dict[str, Tensor] = {"inputs_embeds": embeds}
    cache, tokens, logits = None, [], []
    for _ in range(7):
        width = next(iter(step.values())).shape[1]
        position_ids = (real.cumsum(dim=1) - 1).clamp_min(0)[:, -width:]
        output = model.language_model(
            **step, attention_mask=real, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        logits.append(output.logits[:, -1:])
        tokens.append(logits[-1].argmax(dim=-1))
        step = {"input_ids": tokens[-1]}
        real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
    return torch.cat(tokens, dim=1), torch.cat(logits, dim=1)


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_decoding_through_the_fixed_cache_is_that_of_transformers(compiled: bool) -> None:
    model = adapted()
    pixels, ids, mask, _ = inputs(3, padded=True)
    tokens, logits = through_transformers(model, pixels, ids, mask)
    model.accelerate(compile_layers=compiled)
    found = model._decode(pixels, ids, mask, None, None, None)
    assert torch.equal(found.tokens, tokens) and len(set(tokens.flatten().tolist())) > 2
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate_autoregressive(pixels, ids, mask), tokens)


def test_dropout_in_adapters_is_left_to_peft() -> None:
    model = adapted(dropout=0.5)
    layer = model.language_model.model.layers[0].self_attn.q_proj
    assert isinstance(read_linear(layer.train()), torch.nn.Module)
    assert isinstance(read_linear(layer.eval()), LinearWeights)


@pytest.mark.parametrize(("kernel", "recorded_up_to"), [("sdpa", 8), ("flash_attention_2", 0)])
def test_what_asks_the_host_about_padding_is_not_recorded(kernel: str, recorded_up_to: int) -> None:
    model = random_model(small_config())
    model.language_model.config._attn_implementation = kernel
    model.accelerate(compile_layers=False, graph_batch_size=8)
    assert model._acceleration.graph_batch_size == recorded_up_to
