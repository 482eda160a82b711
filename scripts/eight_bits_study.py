#!/usr/bin/env python3
"""What rounding a policy's linear layers to eight (or four) bits changes of what it says: see docs/eight_bits_study.md.

    python scripts/eight_bits_study.py record OBSERVATIONS.npz      observations of the bundled policy's own episodes
    python scripts/eight_bits_study.py errors OBSERVATIONS.npz      tables, as markdown

Each weight and input is rounded and multiplied in float32; everything between the layers stays float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchrl_vla.checkpoints.policy import Policy, load_policy
from torchrl_vla.config import OpenVLAActorConfig
from torchrl_vla.envs import LiberoEnv, get_suite
from torchrl_vla.modules import OpenVLA, make_actor
from torchrl_vla.modules.openvla.jpeg import decode_jpeg, encode_jpeg

SUITE = "libero_spatial"
Rounding = Callable[[Tensor], Tensor]
Scheme = tuple[Rounding, Rounding]
Chosen = Callable[[str], bool]


def _blocks(x: Tensor, size: int) -> Tensor:
    """The last dimension in blocks, padded with zeros."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _scaled(x: Tensor, largest: float, number: Rounding) -> Tensor:
    """Round with one scale for all of the last dimension."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
    return number(x / scale) * scale


def e4m3(x: Tensor) -> Tensor:
    """Round to float8 e4m3, a scale per row."""
    return _scaled(x, 448.0, lambda y: y.to(torch.float8_e4m3fn).to(x.dtype))


def int8(x: Tensor) -> Tensor:
    """Round to 8-bit integers, a scale per row."""
    return _scaled(x, 127.0, lambda y: y.round().clamp(-127, 127))


def in_blocks(rounding: Rounding, size: int = 128) -> Rounding:
    """Round with a scale per block of a row."""
    return lambda x: rounding(_blocks(x, size)).flatten(-2)[..., : x.shape[-1]]


def per_tensor(rounding: Rounding) -> Rounding:
    """Round with one scale."""
    return lambda x: rounding(x.reshape(-1)).view_as(x)


NF4 = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip


def nf4(x: Tensor) -> Tensor:
    """Round to bitsandbytes' NF4: blocks of 64, one float32 scale each."""
    blocks = _blocks(x, 64)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    edges = ((NF4[1:] + NF4[:-1]) / 2).to(x)
    return (NF4.to(x)[torch.bucketize(blocks / scale, edges)] * scale).flatten(-2)[..., : x.shape[-1]]


def bf16(x: Tensor) -> Tensor:
    """Round to bf16."""
    return x.bfloat16().to(x.dtype)


def same(x: Tensor) -> Tensor:
    """Leave as it is."""
    return x


#: How a layer's weight and its input are rounded.
SCHEMES: dict[str, Scheme] = {
    "bf16 weights and inputs": (bf16, bf16),
    "e4m3, one scale per tensor": (per_tensor(e4m3), per_tensor(e4m3)),
    "e4m3, row-wise": (e4m3, e4m3),
    "e4m3, blocks of 128": (in_blocks(e4m3), in_blocks(e4m3)),
    "e4m3 weights only, row-wise": (e4m3, same),
    "int8, per token and channel": (int8, int8),
    "int8, blocks of 128": (in_blocks(int8), in_blocks(int8)),
    "int8 weights only, per channel": (int8, same),
    "e4m3 weights, int8 inputs": (e4m3, int8),
    "nf4 weights only": (nf4, same),
}

#: Which kind of layer a parameter's name belongs to.
KINDS: dict[str, Chosen] = {
    "vision towers": lambda n: n.startswith("vision_backbone"),
    "projector": lambda n: n.startswith("projector"),
    "proprio projector": lambda n: n.startswith("proprio_projector"),
    "qkv": lambda n: "language_model" in n and any(s in n for s in ("q_proj", "k_proj", "v_proj", "qkv")),
    "o": lambda n: ".o_proj" in n,
    "gate, up": lambda n: "gate" in n or "up_proj" in n,
    "down": lambda n: "down_proj" in n,
    "lm_head": lambda n: "lm_head" in n,
}
DECODER = {"qkv", "o", "gate, up", "down"}


def kind_of(name: str) -> str:
    """Name the kind of a layer."""
    kinds = [kind for kind, belongs in KINDS.items() if belongs(name)]
    assert len(kinds) == 1, (name, kinds)
    return kinds[0]


class Rounded(TorchFunctionMode):
    """Rounds the weights and inputs of the linear layers that are chosen by name."""

    def __init__(self, model: OpenVLA, scheme: Scheme, chosen: Chosen) -> None:
        super().__init__()
        self.weight, self.input = scheme
        self.names = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}
        self.chosen = chosen
        self.kept: dict[str, Tensor] = {}
        self.met: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            name = self.names[weight.untyped_storage().data_ptr()]
            self.met.add(name)
            if self.chosen(name):
                if name not in self.kept:
                    self.kept[name] = self.weight(weight)
                return F.linear(self.input(x), self.kept[name], *bias, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def record(path: Path) -> None:
    """Let the bundled policy act in every task, and keep every third of its observations, as JPEG files."""
    torch.manual_seed(0)
    policy = bundled(torch.device("cpu"))
    env = LiberoEnv(SUITE, num_envs=1, include_instruction=False, fidelity="fast")
    jpegs, states, tasks = [], [], []
    for task in range(10):
        start = {"task_id": torch.tensor([[task]]), "init_state_id": torch.tensor([[40 + task]])}
        data = env.reset(TensorDict(start, [1]))
        for decision in range(13):
            if decision % 3 == 0:
                frame = data["observation", "image"][0].permute(1, 2, 0).contiguous().numpy()
                jpegs.append(np.frombuffer(encode_jpeg(frame), np.uint8))
                states.append(data["observation", "state"][0].numpy())
                tasks.append(task)
            with torch.no_grad():
                data = env.step(policy.actor(data))["next"]
            if data["done"].any():
                break
    env.close()
    offsets = np.cumsum([0, *map(len, jpegs)])
    np.savez(path, jpeg=np.concatenate(jpegs), offsets=offsets, state=np.stack(states), task=np.array(tasks))
    print(f"{len(jpegs)} observations in {path}")


def observations(path: Path, count: int) -> TensorDict:
    """Read observations, evenly spread over those that were recorded."""
    data = np.load(path)
    ends = data["offsets"]
    frames = [decode_jpeg(data["jpeg"][start:end]) for start, end in zip(ends[:-1], ends[1:], strict=True)]
    images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
    observation = {"image": images, "state": torch.from_numpy(data["state"])}
    task_ids = torch.from_numpy(data["task"])[:, None]
    everything = TensorDict({"observation": observation, "task_id": task_ids}, [len(images)])
    return everything[torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()]


def bundled(device: torch.device) -> Policy:
    """Load the bundled policy in float32."""
    actor = OpenVLAActorConfig("bundled:tiny")
    return load_policy(
        actor,
        task_suite=SUITE,
        temperature=1.0,
        device=device,
        dtype=torch.float32,
        trainable=False,
        read_task_ids=True,
    )


def random_policy(device: torch.device, width: int, layers: int, outliers: int) -> Policy:
    """Make an untrained policy with a wider decoder.

    Args:
        device: where to make it.
        width: of the decoder, a multiple of 64.
        layers: of the decoder.
        outliers: how many times larger four channels are than the others, as a few of large language models are; 0:
            none.
    """
    policy = bundled(device)
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width * 43 // 16, "num_attention_heads": width // 64}
    model = OpenVLA(replace(policy.model.config, num_hidden_layers=layers, **sizes)).to(device, torch.float32)
    model.initialize()
    if outliers:
        for name, parameter in model.named_parameters():
            if "language_model" in name and "norm" in name and parameter.ndim == 1:
                parameter.data[torch.arange(0, width, width // 4)] *= outliers
    instructions = {task.task_id: task.instruction for task in get_suite(SUITE).tasks}
    actor = make_actor(model, policy.processor, temperature=1.0, instructions=instructions).to(device)
    policy.model, policy.actor = model.requires_grad_(False).eval(), actor.eval()
    return policy


@torch.no_grad()
def log_probs(
    policy: Policy,
    data: TensorDict,
    scheme: Scheme = (same, same),
    chosen: Chosen = lambda name: False,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute what a policy says with some layers rounded.

    Args:
        policy: the policy.
        data: prepared observations [N].
        scheme: how to round.
        chosen: which layers, by their weight's name.
        gain: what the logits are multiplied with.

    Returns:
        Log-probabilities at temperature 1 and logits, [N, 56, 256] each.
    """
    parts = []
    mode = Rounded(policy.model, scheme, chosen)
    with mode:
        for part in data.split(8):
            parts.append(policy.actor.backbone(part.clone(False))["vla_action", "logits"].float().flatten(1, 2))
    # What was asked for must have been rounded: a layer that went another way would count as exact.
    assert all(name in mode.kept for name in mode.met if chosen(name))
    logits = gain * torch.cat(parts)
    return logits.log_softmax(-1), logits


def figures(reference: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], tokens: Tensor) -> dict[str, float]:
    """Compare what two policies say; `tokens` [N, 56] are those whose log-probabilities are compared."""
    (p, logits), (q, rounded) = reference, other
    kl = (p.exp() * (p - q)).sum(-1)
    change = (q - p).gather(-1, tokens[..., None]).squeeze(-1).abs()
    centred = logits - logits.mean(-1, keepdim=True)
    error = (rounded - rounded.mean(-1, keepdim=True)) - centred
    return {
        "kl": kl.mean().item(),
        "kl_p99": kl.flatten().quantile(0.99).item(),
        "greedy": (p.argmax(-1) == q.argmax(-1)).float().mean().item(),
        "change": change.mean().item(),
        "change_max": change.max().item(),
        "logits": (error.norm() / centred.norm()).item(),
    }


HEAD = (
    "| rounded | KL per token | its 99th percentile | greedy tokens equal | mean change of log-prob | largest | "
    "error of logits |\n|---|---|---|---|---|---|---|"
)


def table(
    title: str, policy: Policy, data: TensorDict, rows: list[tuple[str, Scheme, Chosen]], gain: float = 1.0
) -> None:
    """Print one table."""
    torch.manual_seed(0)
    reference = log_probs(policy, data, gain=gain)
    tokens = torch.distributions.Categorical(logits=reference[0]).sample()
    entropy = -(reference[0].exp() * reference[0]).sum(-1).mean()
    print(f"\n### {title}\n\n{len(data)} observations, entropy {entropy:.2f} nats.\n\n{HEAD}", flush=True)
    for name, scheme, chosen in rows:
        f = figures(reference, log_probs(policy, data, scheme, chosen, gain), tokens)
        print(
            f"| {name} | {f['kl']:.5f} | {f['kl_p99']:.4f} | {f['greedy']:.1%} | {f['change']:.4f} | "
            f"{f['change_max']:.2f} | {f['logits']:.2%} |",
            flush=True,
        )


def in_decoder(name: str) -> bool:
    """Whether a layer is one of the decoder's."""
    return kind_of(name) in DECODER


def errors(path: Path, count: int, widths: list[str]) -> None:
    """Print all tables: the bundled policy's and those of random policies, WIDTH:LAYERS[:OUTLIERS] each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = bundled(device)
    # Images and prompts once, not for every row.
    data = policy.actor.backbone.prepare(observations(path, count).to(device))
    ends = (".layers.0.", f".layers.{policy.model.config.num_hidden_layers - 1}.")
    table("Every linear layer", policy, data, [(n, s, lambda name: True) for n, s in SCHEMES.items()])
    for name in ("e4m3, row-wise", "int8, per token and channel"):
        scheme = SCHEMES[name]
        alone = [(kind, scheme, lambda n, kind=kind: kind_of(n) == kind) for kind in KINDS]
        table(f"{name}: one kind of layer alone", policy, data, alone)
        others = [(f"all but {kind}", scheme, lambda n, kind=kind: kind_of(n) != kind) for kind in KINDS]
        table(f"{name}: all but one kind", policy, data, others)
        parts: dict[str, Chosen] = {
            "decoder alone": in_decoder,
            "decoder without its first and last layer": lambda n: in_decoder(n) and not any(e in n for e in ends),
            "decoder without o and down": lambda n: kind_of(n) in {"qkv", "gate, up"},
            "decoder without down": lambda n: kind_of(n) in DECODER - {"down"},
            "qkv, o, gate, up, without first and last layer": lambda n: (
                kind_of(n) in DECODER - {"down"} and not any(e in n for e in ends)
            ),
        }
        table(f"{name}: parts", policy, data, [(part, scheme, chosen) for part, chosen in parts.items()])
    rows = [(n, s, in_decoder) for n, s in SCHEMES.items()]
    table("Decoder alone", policy, data, rows)
    few = data[:: max(len(data) // 8, 1)][:8]
    for width in widths:
        wide = random_policy(device, *(int(part) for part in f"{width}:0".split(":")[:3]))
        # The head of an untrained policy says nearly the same of every token.
        gain = 2.0 / log_probs(wide, few)[1].std(-1).mean().item()
        table(f"Random weights, {width}, decoder alone", wide, few, rows, gain)


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "errors"])
    parser.add_argument("observations", type=Path)
    parser.add_argument("--count", type=int, default=10**6, help="observations to use, evenly spread; default: all")
    parser.add_argument("--widths", nargs="+", default=["256:6", "1024:6"], help="WIDTH:LAYERS[:OUTLIERS]")
    arguments = parser.parse_args()
    if arguments.what == "record":
        record(arguments.observations)
    else:
        errors(arguments.observations, arguments.count, arguments.widths)


if __name__ == "__main__":
    main()
