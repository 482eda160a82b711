from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_openvla import random_model, small_config
from torch import Tensor

from torchrl_vla.modules.openvla import OpenVLA, VisionTowerConfig, attention
from torchrl_vla.modules.openvla.attention import resolve_attention
from torchrl_vla.modules.openvla.language import arrange_prompt

EMPTY, PAD = 3, 288


def pixels(batch: int, images: int = 1) -> Tensor:
    return torch.randn(batch, 6 * images, 28, 28, generator=torch.Generator().manual_seed(1))


PROMPTS = [[1, 10, 11, 12, 13, EMPTY], [1, 20, EMPTY], [1, 30, 31, 32]]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """PROMPTS as a batch, and its mask."""
    length = max(map(len, PROMPTS))
    ids = torch.full((len(PROMPTS), length), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        where = slice(length - len(prompt), length) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mixed_batch_equals_one_by_one(side: str, implementation: str) -> None:
    model, images, proprio = random_model(attn_implementation=implementation), pixels(3), torch.randn(3, 8)
    ids, mask = padded(side)
    batch = model(images, ids, mask, proprio)
    assert batch.action_logits.shape == (3, 2, 7, 256)
    assert batch.action_logits.dtype == torch.float32
    assert batch.hidden_states.shape == (3, 14, 16)
    for row, prompt in enumerate(PROMPTS):
        ended = prompt if prompt[-1] == EMPTY else [*prompt, EMPTY]
        alone = model(images[row : row + 1], torch.tensor([ended]), None, proprio[row : row + 1])
        torch.testing.assert_close(batch.action_logits[row], alone.action_logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.hidden_states[row], alone.hidden_states[0], atol=1e-5, rtol=0)


def test_what_stands_in_the_padding_does_not_matter(model: OpenVLA) -> None:
    ids, mask = padded("right")
    expected = model(pixels(3), ids, mask).action_logits
    torch.testing.assert_close(model(pixels(3), torch.where(mask == 0, 77, ids), mask).action_logits, expected)


def test_arranged_prompts_by_hand() -> None:
    ids, mask = padded("right")
    prompt = arrange_prompt(ids, mask, EMPTY, PAD)
    assert prompt.first.tolist() == [[1], [1], [1]]
    assert prompt.rest.tolist() == [
        [10, 11, 12, 13, EMPTY],
        [PAD, PAD, PAD, 20, EMPTY],
        [PAD, 30, 31, 32, EMPTY],
    ]
    assert prompt.mask is not None
    assert prompt.mask.tolist() == [[True] * 5, [False] * 3 + [True] * 2, [False] + [True] * 4]


def test_no_mask_is_made_where_no_row_needs_one() -> None:
    ids = torch.tensor([[1, 4, 5], [1, 6, 7]])
    prompt = arrange_prompt(ids, torch.ones_like(ids), EMPTY, PAD)
    assert prompt.mask is None
    assert prompt.rest.tolist() == [[4, 5, EMPTY], [6, 7, EMPTY]]


def test_shapes_do_not_depend_on_values_off_the_cpu() -> None:
    """On the meta device any read-back of a value raises."""
    with torch.device("meta"):
        model = OpenVLA(small_config())
        ids = torch.zeros(3, 6, dtype=torch.long)
        out = model(torch.zeros(3, 6, 28, 28), ids, torch.ones_like(ids), torch.zeros(3, 8))
        assert out.action_logits.shape == (3, 2, 7, 256)
        assert model(torch.zeros(3, 6, 28, 28), ids).hidden_states.shape == (3, 14, 16)


@pytest.mark.compile
def test_it_compiles_to_one_graph() -> None:
    tower = VisionTowerConfig(embed_dim=24, depth=2, num_heads=3)
    model = random_model(small_config(num_hidden_layers=1, siglip=tower, dinov2=replace(tower, num_prefix_tokens=5)))
    ids, mask = padded("right")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(pixels(3), ids, mask, torch.ones(3, 8)).action_logits,
            model(pixels(3), ids, mask, torch.ones(3, 8)).action_logits,
            atol=1e-5,
            rtol=0,
        )


def test_every_token_sees_every_other(model: OpenVLA) -> None:
    """The closing token, last in the sequence, reaches the first decoded row: no causal mask."""
    ids = torch.tensor([[1, 10, 11, EMPTY]])
    before = model(pixels(1), ids).hidden_states
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight[model.config.eos_token_id] += 1.0
    assert (model(pixels(1), ids).hidden_states[:, 0] - before[:, 0]).abs().max() > 1e-2


def test_vision_features_can_be_computed_once(model: OpenVLA) -> None:
    ids, mask = padded("right")
    features = model.encode_images(pixels(3, images=2))
    assert features.shape == (3, 2 * 4, 24 + 20)
    once = model(None, ids, mask, vision_features=features)
    torch.testing.assert_close(once.action_logits, model(pixels(3, images=2), ids, mask).action_logits, atol=0, rtol=0)


def test_images_proprio_and_prompt_all_count(model: OpenVLA) -> None:
    ids = torch.tensor([[1, 10, EMPTY]])
    base = model(pixels(1), ids, None, torch.zeros(1, 8)).action_logits
    for images, prompt, proprio in [
        (pixels(1) + 1, ids, torch.zeros(1, 8)),
        (pixels(1), ids + torch.tensor([0, 1, 0]), torch.zeros(1, 8)),
        (pixels(1), ids, torch.ones(1, 8)),
        (pixels(1), ids, None),
    ]:
        assert (model(images, prompt, None, proprio).action_logits - base).abs().max() > 1e-3


def test_only_action_rows_of_the_head_are_read(model: OpenVLA) -> None:
    ids = torch.tensor([[1, 10, EMPTY]])
    out = model(pixels(1), ids)
    full = model.language_model.lm_head(out.hidden_states)
    torch.testing.assert_close(out.action_logits.view(1, 14, 256), full[..., 32:288], atol=1e-6, rtol=0)
    out.action_logits.sum().backward()
    gradient = model.language_model.lm_head.weight.grad
    assert gradient is not None
    assert not gradient[:32].any() and not gradient[288:].any() and gradient[32:288].any()


def test_every_parameter_but_the_other_head_learns(model: OpenVLA) -> None:
    out = model(pixels(2), torch.tensor([[1, 10, EMPTY]] * 2), None, torch.randn(2, 8))
    out.action_logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_gives_the_same_gradients(model: OpenVLA) -> None:
    ids, mask = padded("left")

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(pixels(3), ids, mask).action_logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    saved: list[int] = []
    model.train().gradient_checkpointing_enable()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        found = gradients()
    kept_with = sum(saved)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    saved.clear()
    model.gradient_checkpointing_enable(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        gradients()
    assert kept_with < 0.7 * sum(saved)


def test_autoregressive_decoding_equals_full_recomputation(model: OpenVLA) -> None:
    """Seven greedy tokens through the cache, against a causal pass over the whole sequence for each."""
    ids, mask = padded("right")
    found = model.generate_autoregressive(pixels(3), ids, mask)
    for row, prompt in enumerate(PROMPTS):
        tokens = prompt if prompt[-1] == EMPTY else [*prompt, EMPTY]
        patches = model.projector(model.encode_images(pixels(3)[row : row + 1]))
        for _ in range(7):
            words = model.language_model.model.embed_tokens(torch.tensor([tokens]))
            embeds = torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)
            logits = model.language_model(inputs_embeds=embeds).logits[0, -1]
            tokens = [*tokens, int(logits.argmax())]
        assert found[row].tolist() == tokens[-7:]


def test_casting_leaves_the_rotary_angles_alone() -> None:
    """A bfloat16 model turns by angles computed in float32: positions 256 and 257 differ."""
    rotary = random_model().to(torch.bfloat16).language_model.model.rotary_emb
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.tensor([[256, 257]]))
    torch.testing.assert_close(cos[0, :, 0], torch.tensor([256.0, 257.0]).cos())
    torch.testing.assert_close(sin[0, :, 1], (torch.tensor([256.0, 257.0]) / 10000 ** (2 / 8)).sin())


def test_bfloat16_stays_close() -> None:
    model = random_model()
    ids = torch.tensor([[1, 10, EMPTY]])
    expected = model(pixels(1), ids, None, torch.ones(1, 8))
    low = model.to(torch.bfloat16)(pixels(1), ids, None, torch.ones(1, 8))
    assert low.action_logits.dtype == torch.float32 and low.hidden_states.dtype == torch.bfloat16
    spread = expected.action_logits.std()
    assert (low.action_logits - expected.action_logits).abs().mean() < 0.1 * spread


def test_l1_head_needs_to_be_there(model: OpenVLA) -> None:
    with pytest.raises(ValueError, match="no L1 head"):
        model.predict_l1(torch.zeros(1, 14, 16))
    assert random_model(use_l1_head=True).predict_l1(torch.zeros(3, 14, 16)).shape == (3, 2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(pixel_values=torch.zeros(1, 6, 56, 56)), r"\[batch, 6 \* images, 28, 28\].*got \(1, 6, 56, 56\)"),
        (dict(pixel_values=torch.zeros(1, 3, 28, 28)), r"got \(1, 3, 28, 28\)"),
        (dict(input_ids=torch.tensor([1, EMPTY])), r"input_ids must be \[batch, length\]"),
        (dict(input_ids=torch.tensor([[1, 9]])), "must end with the token 3"),
        (dict(input_ids=torch.tensor([[1, EMPTY]] * 2)), "2 prompts were given with images of 1"),
        (dict(attention_mask=torch.ones(1, 5)), "differ in shape"),
        (dict(attention_mask=torch.zeros(1, 2)), "at least one token"),
        (dict(vision_features=torch.zeros(1, 4, 44)), "either pixel_values or vision_features"),
        (dict(pixel_values=None), "either pixel_values or vision_features"),
    ],
)
def test_bad_inputs_are_refused(model: OpenVLA, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**{"pixel_values": pixels(1), "input_ids": torch.tensor([[1, EMPTY]]), **arguments})


def test_proprio_without_projector_is_refused() -> None:
    model = random_model(small_config(use_proprio=False))
    with pytest.raises(ValueError, match="no proprio_projector"):
        model(pixels(1), torch.tensor([[1, EMPTY]]), None, torch.zeros(1, 8))


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="sdpa, flash_attention_2, eager"):
        OpenVLA(small_config(), attn_implementation="magic")
    with pytest.raises(ValueError, match="sdpa, flash_attention_2, eager"):
        resolve_attention("magic", "cpu", torch.float32)
    with pytest.raises(ValueError, match="'flash_attention_2' cannot be used: .*Use 'sdpa'"):
        resolve_attention("flash_attention_2", "cpu", torch.float32)


def test_flash_attention_4_is_not_taken_for_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)  # what flash-attention 4 installs
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("flash_attn") is not None
    assert resolve_attention.__wrapped__(None, "cuda", torch.bfloat16) == "sdpa"


def test_flash_attention_2_is_taken_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    resolve = resolve_attention.__wrapped__  # not what an earlier call found
    assert resolve(None, "cuda", torch.bfloat16) == "flash_attention_2"
    assert resolve("sdpa", "cuda", torch.bfloat16) == "sdpa"
    assert resolve(None, "cuda", torch.float32) == resolve(None, "cpu", torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match="not cuda and torch.float32"):
        resolve("flash_attention_2", "cuda", torch.float32)


def test_the_attention_kernel_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    resolve_attention.cache_clear()
    with caplog.at_level("INFO"):
        assert [resolve_attention(None, "cpu", torch.float32) for _ in range(3)] == ["sdpa"] * 3
    assert [record.message.split(" (")[0] for record in caplog.records] == ["attention kernel: sdpa"]
