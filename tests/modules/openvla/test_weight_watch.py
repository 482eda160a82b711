"""An accelerated policy computes with the weights it has now, whoever wrote them and however."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_openvla import random_model, small_config
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torchrl.weight_update import WeightStrategy

from torchrl_vla.checkpoints.adapters import load_adapter, save_adapter
from torchrl_vla.modules.openvla import OpenVLA
from torchrl_vla.modules.openvla.graphs import ForwardGraphs, GraphRecorder
from torchrl_vla.modules.openvla.lora import add_lora, merge_lora, without_adapters

pytestmark = pytest.mark.slow

Write = Callable[[OpenVLA, OpenVLA], object]


def adapted(seed: int) -> OpenVLA:
    """A model whose adapters are large enough to matter, the seed's; the weights below them are always the same."""
    model = add_lora(random_model(small_config()), rank=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, None, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[1, 10, 11, 3], [1, 12, 13, 3]])[torch.arange(batch) % 2]
    return torch.randn(batch, 6, 28, 28, generator=generator), ids, None, torch.randn(batch, 8, generator=generator)


def act(model: OpenVLA) -> Tensor:
    with torch.no_grad():
        return model(*inputs()).action_logits


def learned(model: OpenVLA) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(*inputs()).action_logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pairs(source: OpenVLA, target: OpenVLA) -> list[tuple[Tensor, Tensor]]:
    return list(zip(source.parameters(), target.parameters(), strict=True))


def write_data(source: OpenVLA, target: OpenVLA) -> None:
    for new, parameter in pairs(source, target):
        parameter.data.copy_(new.data)


def replace_data(source: OpenVLA, target: OpenVLA) -> None:
    for new, parameter in pairs(source, target):
        parameter.data = new.data.clone()


def write_numpy(source: OpenVLA, target: OpenVLA) -> None:
    for new, parameter in pairs(source, target):
        parameter.detach().numpy()[...] = new.detach().numpy()


def write_flat(source: OpenVLA, target: OpenVLA) -> None:
    """Into one tensor that all adapters are views of, since before the last forward."""
    adapters = [p for p in target.parameters() if p.requires_grad]
    flat = parameters_to_vector(adapters).detach().clone()
    vector_to_parameters(flat, adapters)
    act(target)
    flat.copy_(parameters_to_vector(p for p in source.parameters() if p.requires_grad).detach())


def exchange_parameters(source: OpenVLA, target: OpenVLA) -> None:
    for name, parameter in source.named_parameters():
        owner, _, leaf = name.rpartition(".")
        clone = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(target.get_submodule(owner), leaf, clone)


def apply_strategy(extract_as: str) -> Write:
    strategy = WeightStrategy(extract_as=extract_as)
    return lambda source, target: strategy.apply_weights(target, strategy.extract_weights(source))


@torch.no_grad()
def write_by_foreach(source: OpenVLA, target: OpenVLA) -> None:
    torch._foreach_copy_(list(target.parameters()), list(source.parameters()))


WAYS: dict[str, Write] = {
    "copy_": write_by_foreach,
    "data.copy_": write_data,
    "data = x": replace_data,
    "numpy": write_numpy,
    "flat tensor": write_flat,
    "vector_to_parameters": lambda source, target: vector_to_parameters(
        parameters_to_vector(source.parameters()).detach(), target.parameters()
    ),
    "load_state_dict": lambda source, target: target.load_state_dict(source.state_dict()),
    "load_state_dict(assign)": lambda source, target: target.load_state_dict(
        copy.deepcopy(source.state_dict()), assign=True
    ),
    "TensorDict.data.update_": lambda source, target: TensorDict.from_module(target).data.update_(
        TensorDict.from_module(source).data
    ),
    "TensorDict.to_module": lambda source, target: TensorDict.from_module(source).to_module(target),
    "WeightStrategy(tensordict)": apply_strategy("tensordict"),
    "WeightStrategy(state_dict)": apply_strategy("state_dict"),
    "other parameters": exchange_parameters,
}


@pytest.mark.parametrize("way", WAYS)
def test_written_weights_reach_the_next_forward_and_the_next_update(way: str) -> None:
    source, target = adapted(1), adapted(2)
    expected, (_, gradients) = act(source), learned(copy.deepcopy(source))
    target.accelerate(compile_layers=False)
    assert (act(target) - expected).abs().max() > 0.1  # it acts with its own, and has kept what it computes with
    learned(target)
    WAYS[way](source, target)
    for _ in range(3):  # what was exchanged is taken over at the second
        torch.testing.assert_close(act(target), expected, atol=1e-4, rtol=1e-4)
    logits, found = learned(target)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert found.keys() == gradients.keys()
    torch.testing.assert_close(found, gradients, atol=1e-4, rtol=1e-3)
    assert torch.equal(act(target), target(*inputs()).action_logits)


def test_an_update_comes_first_after_a_write() -> None:
    source, target = adapted(1), adapted(2)
    target.accelerate(compile_layers=False)
    learned(target)
    write_data(source, target)
    torch.testing.assert_close(learned(target), learned(source), atol=1e-4, rtol=1e-3)


def test_written_weights_reach_the_features_alone() -> None:
    source, target = adapted(1), adapted(2)
    target.accelerate(compile_layers=False)
    pixels = inputs()[0]
    with torch.no_grad():
        target.encode_images(pixels)
        write_data(source, target)
        torch.testing.assert_close(target.encode_images(pixels), source.encode_images(pixels), atol=1e-4, rtol=1e-4)


def test_another_scale_counts() -> None:
    source, target = adapted(1), adapted(1)
    target.accelerate(compile_layers=False)
    before = act(target)
    for model in (source, target):
        model.language_model.model.layers[0].self_attn.q_proj.scaling["default"] = 3.0
    assert (act(source) - before).abs().max() > 1e-3
    for _ in range(2):
        torch.testing.assert_close(act(target), act(source), atol=1e-4, rtol=1e-4)


def test_adapters_come_and_go_after_acceleration(tmp_path: Path) -> None:
    source, target = adapted(1), random_model(small_config())
    save_adapter(source, tmp_path)
    plain = act(target)
    target.accelerate(compile_layers=False)
    torch.testing.assert_close(act(target), plain, atol=1e-4, rtol=1e-4)
    load_adapter(target, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(act(target), act(source), atol=1e-4, rtol=1e-4)
    with torch.no_grad(), without_adapters(target):
        torch.testing.assert_close(target(*inputs()).action_logits, plain, atol=1e-4, rtol=1e-4)
    target.accelerate(compile_layers=False)  # now with room for them
    torch.testing.assert_close(act(target), act(source), atol=1e-4, rtol=1e-4)
    write_data(adapted(3), target)
    torch.testing.assert_close(act(target), act(adapted(3)), atol=1e-4, rtol=1e-4)
    merge_lora(target)
    for _ in range(2):
        torch.testing.assert_close(act(target), act(adapted(3)), atol=1e-4, rtol=1e-4)


def test_weights_for_one_call_leave_those_of_the_model_alone() -> None:
    source, target = adapted(1), adapted(2)
    own, theirs = act(target), act(source)
    target.accelerate(compile_layers=False)
    act(target)
    for _ in range(2):
        with TensorDict.from_module(source).data.to_module(target):
            torch.testing.assert_close(act(target), theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(act(target), own, atol=1e-4, rtol=1e-4)
    called = torch.func.functional_call(target, dict(source.named_parameters()), inputs())
    torch.testing.assert_close(called.action_logits.detach(), theirs, atol=1e-4, rtol=1e-4)
    # Two sets side by side, as TorchRL's losses call a network with its parameters and its target's.
    stacked = torch.stack([TensorDict.from_module(model).data for model in (source, target)])
    observed = inputs()

    def call(params: TensorDict) -> Tensor:
        with params.to_module(target):
            return target(*observed).action_logits

    both = torch.vmap(call)(stacked)
    torch.testing.assert_close(both, torch.stack([theirs, own]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(act(target), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("compile_layers", [False, True])
def test_copies_of_an_accelerated_model_have_weights_of_their_own(
    duplicate: Callable[[OpenVLA], OpenVLA], compile_layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, options: f)
    source, target = adapted(1), adapted(2)
    own = act(target)
    target.accelerate(compile_layers=compile_layers)
    act(target)
    other = duplicate(target)
    assert other.accelerated
    torch.testing.assert_close(act(other), own, atol=1e-4, rtol=1e-4)
    write_data(source, other)
    torch.testing.assert_close(act(other), act(source), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(act(target), own, atol=1e-4, rtol=1e-4)


def test_a_backward_pass_through_weights_that_were_written_since_is_refused() -> None:
    """As without copies: autograd knows of a write that it was told of."""
    for accelerated in (False, True):
        model = adapted(1)
        if accelerated:
            model.accelerate(compile_layers=False)
        loss = model(*inputs()).action_logits.square().mean()
        with torch.no_grad():
            model.language_model.model.layers[0].self_attn.v_proj.lora_A["default"].weight.mul_(2)
        act(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_forward_between_forward_and_backward_changes_no_gradient() -> None:
    """The reference policy's, for instance."""
    model = adapted(1)
    _, expected = learned(adapted(1))
    model.accelerate(compile_layers=False)
    loss = model(*inputs()).action_logits.square().mean()
    act(model)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


class BoundRecorder(GraphRecorder):
    """Runs a function again in the place of a GPU's replay, on the memory that parameters had at the recording."""

    def __init__(self, model: OpenVLA) -> None:
        super().__init__()
        self.model, self.recorded = model, 0

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self.recorded += 1
        bound = [(p, p.data) for p in self.model.parameters()]
        results = function()

        def replay() -> None:
            now = [p.data for p, _ in bound]
            for parameter, memory in bound:
                parameter.data = memory
            for result, new in zip(results, function(), strict=True):
                result.copy_(new)
            for (parameter, _), memory in zip(bound, now, strict=True):
                parameter.data = memory

        return replay, results


def test_recorded_forwards_follow_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = adapted(1), adapted(2)
    recorder = BoundRecorder(target)
    monkeypatch.setattr("torchrl_vla.modules.openvla.graphs.GraphRecorder", lambda: recorder)
    monkeypatch.setattr(ForwardGraphs, "serves", lambda self, tensors: not torch.is_grad_enabled())
    own, theirs, reference = act(target), act(source), act(random_model(small_config()))
    target.accelerate(compile_layers=False, graph_batch_size=8)
    for _ in range(2):
        torch.testing.assert_close(act(target), own, atol=1e-4, rtol=1e-4)
    assert recorder.recorded == 1
    write_data(source, target)  # in place: the recording serves
    torch.testing.assert_close(act(target), theirs, atol=1e-4, rtol=1e-4)
    assert recorder.recorded == 1
    for _ in range(2):
        with torch.no_grad(), without_adapters(target):  # the reference policy, recorded too
            torch.testing.assert_close(target(*inputs()).action_logits, reference, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(act(target), theirs, atol=1e-4, rtol=1e-4)
    assert recorder.recorded == 2
    with TensorDict.from_module(adapted(2)).data.to_module(target):  # for one call: not recorded
        torch.testing.assert_close(act(target), own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(act(target), theirs, atol=1e-4, rtol=1e-4)
    assert recorder.recorded == 2
    replace_data(adapted(2), target)  # elsewhere: recorded again
    for _ in range(2):
        torch.testing.assert_close(act(target), own, atol=1e-4, rtol=1e-4)
    assert recorder.recorded == 3
