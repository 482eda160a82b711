"""The parts of `torchrl-vla bench gpu`."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_vla.bench.report import Figure, Report
from torchrl_vla.config import PPOConfig
from torchrl_vla.modules.openvla import blocks, vision
from torchrl_vla.modules.openvla.lora import add_lora
from torchrl_vla.objectives import AsymmetricClipPPOLoss
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.policy import Policy, build_policy
from torchrl_vla.training.trainer import PPOTrainer

if TYPE_CHECKING:
    from torchrl_vla.bench.gpu import GpuBench

_GRAPH_BATCH_SIZE = 4
_PROMPT_TOKENS = 36  # with 256 patches, 56 action slots and </s>: 349
_WANTED_ROLLOUT = {1: 12.5, 8: 9.0, 32: 8.5}
_GIB = 2**30


class Bench:
    """What the parts share: one policy with adapters, its inputs, and what has been measured of it.

    Args:
        options: of the command.
        report: takes the figures.
        started: when the process began, by `time.perf_counter`.
    """

    def __init__(self, options: GpuBench, report: Report, started: float) -> None:
        self.options, self.report, self.started = options, report, started
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.accelerated = False
        self.naive: dict[str, float] = {}
        self.floor_seconds: float | None = None
        self.expected: Tensor | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @cached_property
    def policy(self) -> Policy:
        """The policy, LoRA-32 on every linear layer, its output adapters not at zero so that they count."""
        torch.manual_seed(0)
        began = time.perf_counter()
        policy = build_policy(self.options.model, temperature=1.6, device=self.device)
        add_lora(policy.model, rank=32, alpha=16)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if ".lora_B" in name:
                    parameter.normal_(std=1e-3)
        policy.model.eval()
        self.synchronize()
        self.report.note("policy built: seconds", round(time.perf_counter() - began, 2))
        return policy

    @property
    def model(self) -> Any:
        """The network."""
        return self.policy.model

    def accelerate(self) -> None:
        """Take the fast paths from here on, as the presets do."""
        if not self.accelerated:
            set_adapters(self.model, torch.float32)
            self.model.accelerate(graph_batch_size=_GRAPH_BATCH_SIZE if self.on_gpu else 0)
            self.accelerated = True

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """Model inputs of 349 tokens each."""
        config = self.model.config
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(batch, 6, config.image_size, config.image_size, generator=generator)
        ids = torch.randint(4, 200, (1, _PROMPT_TOKENS), generator=generator).expand(batch, -1).clone()
        ids[:, 0], ids[:, -1] = config.bos_token_id, config.empty_token_id
        proprio = torch.zeros(batch, config.proprio_dim) if config.use_proprio else None
        return (
            pixels.to(self.device), ids.to(self.device), None, None if proprio is None else proprio.to(self.device)
        )  # fmt: skip

    def decisions(self, count: int) -> TensorDictBase:
        """What a rollout of the policy would have stored: observations, tokens and their log-probabilities."""
        instruction = _instruction_of(self.policy, _PROMPT_TOKENS)
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8, generator=generator)
        observation = TensorDict({"image": images, "state": torch.zeros(count, 8)}, [count])
        seen = TensorDict({"observation": observation, "language_instruction": [instruction] * count}, [count])
        with torch.no_grad():
            data = torch.cat([self.policy.actor(part.to(self.device)) for part in seen.split(16)]).cpu()
        half = torch.arange(count) % 2 == 0
        data.set("advantage", torch.where(half, 1.0, -1.0).unsqueeze(-1))
        done = torch.zeros(count, 1, dtype=torch.bool)
        done[-1] = True
        return data.set(("next", "done"), done)

    def trainer(self, **values: Any) -> PPOTrainer:
        """A trainer as the presets make it, over decisions that have their advantages."""
        defaults = {"n_epochs": 1, "traj_split_num": 1, "val_interval": 0, "batch_size": "auto"}
        config = PPOConfig(**{**defaults, **values})
        loss = AsymmetricClipPPOLoss(self.policy.actor, None, entropy_coeff=config.entropy_coef).to(self.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.actor_lr, weight_decay=0.0, fused=self.on_gpu)
        logger = RunLogger(Path(tempfile.mkdtemp(prefix="torchrl-vla-bench-")))
        return PPOTrainer(
            config, [], loss, lambda data: data, optimizer, logger, device=self.device,
            set_recompute=self.model.gradient_checkpointing_enable,
        )  # fmt: skip

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], Any], repeats: int = 5, warm_ups: int = 2) -> float:
        """Median time of a call, waiting for the device after each."""
        for _ in range(warm_ups):
            function()
        times = []
        for _ in range(repeats):
            self.synchronize()
            began = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times) * 1e3

    @contextmanager
    def peak(self, figures: dict[str, float]) -> Iterator[None]:
        """Peak GPU memory of a block in GiB: allocated, and reserved from the card."""
        self.clean()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.on_gpu:
            figures["allocated"] = torch.cuda.max_memory_allocated() / _GIB
            figures["reserved"] = torch.cuda.max_memory_reserved() / _GIB

    def clean(self) -> None:
        """Give memory back between parts."""
        if "policy" in self.__dict__:
            self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def floor(self, passes: float) -> str:
        """The floor of so many forwards of arithmetic, for a figure's name."""
        return "" if self.floor_seconds is None else f" (floor {passes * self.floor_seconds * 1e3:.1f})"


def set_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the adapters in another dtype."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)


def _instruction_of(policy: Policy, tokens: int) -> str:
    """An instruction whose prompt has so many tokens."""
    for words in range(1, 2 * tokens):
        instruction = " ".join(["bowl"] * words)
        if policy.processor.encode_instructions([instruction])[0].shape[1] >= tokens:
            break
    return instruction


def flops_per_decision(model: Any, inputs: tuple[Any, ...]) -> float:
    """Floating-point operations of one forward in the model's products, adapters left out, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    from torchrl_vla.modules.openvla.lora import without_adapters

    with torch.no_grad(), without_adapters(model), FlopCounterMode(display=False) as counter:
        model._forward(*inputs, None)
    return counter.get_total_flops() / len(inputs[0])


def measure_floor(bench: Bench) -> None:
    """What this card's products and copies alone would take."""
    size = 8192 if bench.on_gpu else 512
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    rate = 2 * size**3 / bench.milliseconds(lambda: torch.mm(a, b), repeats=20) * 1e3
    source = torch.randn(size, size * 8, device=bench.device, dtype=dtype)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / bench.milliseconds(lambda: target.copy_(source), repeats=20) * 1e3
    report = bench.report
    report.note("products, TFLOP/s", round(rate / 1e12, 1))
    report.note("copies, TB/s", round(bandwidth / 1e12, 2))
    flops = flops_per_decision(bench.model, bench.inputs(1))
    weights = sum(p.nbytes for p in bench.model.parameters())
    bench.floor_seconds = flops / rate
    report.note("a forward, TFLOP", round(flops / 1e12, 3))
    report.note("floor of a forward, ms", round(flops / rate * 1e3, 2))
    report.note("floor of reading the weights once, ms", round(weights / bandwidth * 1e3, 2))
    report.note("weights with adapters, GiB", round(weights / _GIB, 2))
    config = bench.model.config
    for rows in (349, 8 * 349, 16 * 349) if bench.on_gpu else (349,):
        shares = []
        for inside, outside in (
            (config.hidden_size, 3 * config.hidden_size), (config.hidden_size, config.hidden_size),
            (config.hidden_size, 2 * config.intermediate_size), (config.intermediate_size, config.hidden_size),
        ):  # fmt: skip
            x = torch.randn(rows, inside, device=bench.device, dtype=dtype)
            weight = torch.randn(outside, inside, device=bench.device, dtype=dtype)
            seconds = bench.milliseconds(lambda x=x, weight=weight: F.linear(x, weight), repeats=20) / 1e3
            shares.append(round(2 * rows * inside * outside / seconds / 1e12))
        report.note(f"products of {rows} rows (qkv, output, gate and up, down), TFLOP/s", shares)


@contextmanager
def peft_layers() -> Iterator[None]:
    """Adapted layers run through peft's own modules, none fused."""
    kept = blocks.read_linear, blocks.read_group, vision.read_linear
    blocks.read_linear = vision.read_linear = lambda module: module  # type: ignore[assignment]
    blocks.read_group = tuple  # type: ignore[assignment]
    try:
        yield
    finally:
        blocks.read_linear, blocks.read_group, vision.read_linear = kept  # type: ignore[assignment]


def measure_naive(bench: Bench) -> None:
    """What the guide's loop does: peft's layers, one sample at a time, everything recomputed, the cache emptied."""
    if bench.accelerated:
        raise ValueError("naive has to be measured before the fast paths are on")
    model = bench.model
    set_adapters(model, model.dtype)
    with peft_layers():
        with torch.no_grad():
            for batch in _WANTED_ROLLOUT:
                inputs = bench.inputs(batch)
                bench.naive[f"rollout {batch}"] = bench.milliseconds(lambda i=inputs: model(*i), 3, 1) / batch
            # Two samples are enough to compare with, and stay on the device.
            bench.expected = model(*bench.inputs(2)).action_logits
        trainer = bench.trainer(batch_size=1, recompute=1.0)
        data = bench.decisions(4)
        peak: dict[str, float] = {}

        def sample() -> None:
            for one in data.split(1):
                trainer._backward(one.to(bench.device), 0.25, True, {})
                bench_empty_cache(bench)

        with bench.peak(peak):
            bench.naive["update"] = bench.milliseconds(sample, 1, 1) / len(data)
        bench.naive["update peak"] = peak.get("reserved", 0.0)
    for name, value in bench.naive.items():
        bench.report.note(f"naive {name}, {'GiB' if 'peak' in name else 'ms'}", round(value, 2))
    set_adapters(model, torch.float32)


def bench_empty_cache(bench: Bench) -> None:
    """Empty the cache, as the guide's loop does after every sample."""
    if bench.on_gpu:
        torch.cuda.empty_cache()


def measure_rollout(bench: Bench) -> None:
    """A forward without gradient, per decision."""
    bench.accelerate()
    first = True
    for batch, wanted in _WANTED_ROLLOUT.items():
        inputs = bench.inputs(batch)
        with torch.no_grad():
            began = time.perf_counter()
            bench.model(*inputs)
            bench.synchronize()
            bench.report.note(f"first forward of {batch}: seconds", round(time.perf_counter() - began, 1))
            if first:
                since = time.perf_counter() - bench.started
                bench.report.note("first decision after start: seconds", round(since, 1))
            first = False
            milliseconds = bench.milliseconds(lambda i=inputs: bench.model(*i), 10) / batch
        name = f"rollout forward, batch {batch}, per decision{bench.floor(1)}"
        naive = bench.naive.get(f"rollout {batch}")
        bench.report.add(Figure(name, "ms", milliseconds, naive, wanted=wanted if bench.on_gpu else None))
    if bench.expected is not None:
        with torch.no_grad():
            logits = bench.model(*bench.inputs(2)).action_logits
        change = (logits.log_softmax(-1) - bench.expected.log_softmax(-1)).abs()
        bench.report.note("log-probabilities, fast against naive: mean and largest difference",
                          [round(change.mean().item(), 5), round(change.max().item(), 4)])  # fmt: skip


def measure_update(bench: Bench) -> None:
    """Forward, loss and backward of a decision, and the optimizer's share, at the presets' settings."""
    bench.accelerate()
    data = bench.decisions(bench.options.decisions)
    for name, wanted, passes, settings in (
        ("80gb preset", 20.0, 2, {}),
        ("24gb preset", 35.0, 3, {"memory_gb": 22.0}),
        ("24gb preset, batch_size 1", None, 2, {"memory_gb": 22.0, "batch_size": 1}),
    ):
        _measure_update(bench, data, name, wanted, passes, settings)


def _measure_update(
    bench: Bench, data: TensorDictBase, name: str, wanted: float | None, passes: int, settings: dict[str, Any]
) -> None:
    trainer = bench.trainer(traj_mini_batch_size=8, **settings)
    first = trainer.update(data)
    chosen = trainer.micro_batch
    bench.report.note(f"{name}: micro-batch, recomputed share", [chosen.size, chosen.recompute])
    costs = {
        f"{size}/{share:.2f}": f"{cost.seconds / size * 1e3:.1f} ms, {cost.bytes / _GIB:.2f} GiB"
        for (size, share), cost in chosen.costs.items()
    }
    bench.report.note(f"{name}: per decision at size/share", costs)
    bench.report.note(f"{name}: first step, ratio max, KL, clipped",
                      [first[f"train/{key}"] for key in ("max_ratio", "approx_kl", "clipfrac")])  # fmt: skip
    peak: dict[str, float] = {}
    with bench.peak(peak):
        milliseconds = bench.milliseconds(lambda: trainer.update(data), 1, 0) / len(data)
    title = f"update, {name}, per decision and epoch{bench.floor(passes)}"
    bench.report.add(Figure(title, "ms", milliseconds, bench.naive.get("update"), wanted=wanted))
    if bench.on_gpu:
        limit = {"24gb preset": 22.0, "24gb preset, batch_size 1": 18.0}.get(name)
        bench.report.add(Figure(f"peak memory, {name}", "GiB", peak["reserved"], bench.naive.get("update peak"),
                                wanted=limit))  # fmt: skip
        bench.report.note(f"{name}: allocated, GiB", round(peak["allocated"], 2))
    trainer.logger.close()


def measure_profile(bench: Bench) -> None:
    """Where the time of a rollout and of an update goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    bench.accelerate()
    activities = [ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU]
    trainer = bench.trainer(batch_size=16, recompute=0.0)
    data = bench.decisions(16).to(bench.device)

    def update() -> None:
        trainer._backward(data, 1.0, True, {})

    def rollout(batch: int) -> None:
        with torch.no_grad():
            bench.model(*bench.inputs(batch))

    for name, function in (
        ("rollout of 1", lambda: rollout(1)), ("rollout of 32", lambda: rollout(32)), ("update of 16", update),
    ):  # fmt: skip
        function()
        bench.synchronize()
        with profile(activities=activities) as recorded:
            function()
            bench.synchronize()
        attribute = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
        events = [(getattr(event, attribute), event.count, event.key) for event in recorded.key_averages()]
        total = sum(time for time, _, _ in events) or 1
        bench.report.note(f"profile, {name}: ms of kernels", round(total / 1e3, 2))
        rows = [f"{time / 1e3:8.2f} ms {time / total:6.1%} {count:5d} x {key[:90]}"
                for time, count, key in sorted(events, reverse=True)[:22]]  # fmt: skip
        bench.report.note(f"profile, {name}", "\n  " + "\n  ".join(rows))


def measure_autoregressive(bench: Bench) -> None:
    """Base OpenVLA's seven tokens, one after the other."""
    bench.accelerate()
    pixels, ids, _, _ = bench.inputs(1)
    milliseconds = bench.milliseconds(lambda: bench.model.generate_autoregressive(pixels, ids), 3, 2)
    wanted = 60.0 if bench.on_gpu else None
    bench.report.add(Figure("autoregressive decoding, per action (floor 35)", "ms", milliseconds, wanted=wanted))


def measure_attention(bench: Bench) -> None:
    """The kernels that scaled-dot-product attention can take, at the decoder's shapes, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config, rows = bench.model.config, 16
    shape = (rows, 349, config.num_attention_heads, config.head_dim)
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    query, key, value = (
        torch.randn(shape, device=bench.device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    padding = torch.ones(rows, 1, 349, 349, dtype=torch.bool, device=bench.device)
    for name, backend, mask in (
        ("flash-attention 2", SDPBackend.FLASH_ATTENTION, None), ("cuDNN", SDPBackend.CUDNN_ATTENTION, None),
        ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION, None),
        ("memory-efficient, padded", SDPBackend.EFFICIENT_ATTENTION, padding),
        ("cuDNN, padded", SDPBackend.CUDNN_ATTENTION, padding), ("plain", SDPBackend.MATH, None),
    ):  # fmt: skip

        def both(backend: SDPBackend = backend, mask: Tensor | None = mask) -> None:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()

        try:
            bench.report.add(Figure(f"attention of {rows} x 349 tokens, {name}", "ms", bench.milliseconds(both)))
        except RuntimeError as error:
            bench.report.note(f"attention, {name}", f"cannot run: {str(error).splitlines()[0]}"[:120])


def measure_capped(bench: Bench) -> None:
    """The 24gb preset with the card's memory cut to 24 GiB: what does not fit fails."""
    if not bench.on_gpu:
        raise ValueError("only a GPU's memory can be cut")
    bench.accelerate()
    bench.clean()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(24 * _GIB / total)
    try:
        _measure_update(bench, bench.decisions(32), "24gb preset, card cut to 24 GiB", 35.0, 3, {"memory_gb": 22.0})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measure_loop(bench: Bench) -> None:
    """Rollout in LIBERO and one update, end to end, through the trainer that `torchrl-vla train` runs."""
    from torchrl_vla.bench.gpu_loop import measure

    measure(bench)


MEASURES: dict[str, Callable[[Bench], None]] = {
    "floor": measure_floor, "naive": measure_naive, "rollout": measure_rollout, "update": measure_update,
    "profile": measure_profile, "autoregressive": measure_autoregressive, "attention": measure_attention,
    "capped": measure_capped, "loop": measure_loop,
}  # fmt: skip
