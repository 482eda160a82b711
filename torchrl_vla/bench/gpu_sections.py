"""The parts of `torchrl-vla bench gpu`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrl_vla.bench.gpu_policy import GIB, Bench, set_adapters
from torchrl_vla.bench.measurements import Figure
from torchrl_vla.errors import UserError
from torchrl_vla.modules.openvla import blocks, vision

_WANTED_ROLLOUT = {1: 12.5, 8: 9.0, 32: 8.5}


def flops_per_decision(model: Any, inputs: tuple[Any, ...]) -> float:
    """Floating-point operations of one forward in the model's products, adapters left out, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    from torchrl_vla.modules.openvla.lora import without_adapters

    with torch.no_grad(), without_adapters(model), FlopCounterMode(display=False) as counter:
        model._forward(*inputs, None)
    return counter.get_total_flops() / len(inputs[0])


def measure_floor(bench: Bench) -> None:
    """Measure what this card's products and copies alone would take."""
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
    report.note("weights with adapters, GiB", round(weights / GIB, 2))
    config = bench.model.config
    for rows in (349, 8 * 349, 16 * 349) if bench.on_gpu else (349,):
        shares = []
        for inside, outside in (
            (config.hidden_size, 3 * config.hidden_size), (config.hidden_size, config.hidden_size),
            (config.hidden_size, 2 * config.intermediate_size), (config.intermediate_size, config.hidden_size),
        ):  # fmt: skip
            x = torch.randn(rows, inside, device=bench.device, dtype=dtype)
            weight = torch.randn(outside, inside, device=bench.device, dtype=dtype)
            seconds = bench.milliseconds(partial(F.linear, x, weight), repeats=20) / 1e3
            shares.append(round(2 * rows * inside * outside / seconds / 1e12))
        report.note(f"products of {rows} rows (qkv, output, gate and up, down), TFLOP/s", shares)


@contextmanager
def peft_layers() -> Iterator[None]:
    """Adapted layers run through peft's own modules, none fused."""
    kept = blocks.read_linear, blocks.read_group, vision.read_linear
    blocks.read_linear = vision.read_linear = lambda module, fused=False: module  # type: ignore[assignment,misc]
    blocks.read_group = lambda modules, fused: tuple(modules)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        blocks.read_linear, blocks.read_group, vision.read_linear = kept  # type: ignore[assignment]


def measure_naive(bench: Bench) -> None:
    """Measure the plain loop: peft's layers, one sample at a time, everything recomputed, the cache emptied."""
    if bench.model.accelerated:
        raise UserError("naive has to be measured before the fast paths are on")
    model = bench.model
    set_adapters(model, model.dtype)
    with peft_layers():
        with torch.no_grad():
            for batch in _WANTED_ROLLOUT:
                inputs = bench.inputs(batch)
                bench.naive[f"rollout {batch}"] = bench.milliseconds(partial(model, *inputs), 3, 1) / batch
            # Two samples are enough to compare with, and stay on the device.
            bench.expected["naive"] = model(*bench.inputs(2)).action_logits.log_softmax(-1)
            if not bench.on_gpu or torch.cuda.mem_get_info()[0] > 2 * sum(p.nbytes for p in model.parameters()):
                # bfloat16 comes back from float32 as it was.
                dtype = model.dtype
                model.float()
                bench.expected["float32"] = model(*bench.inputs(2)).action_logits.log_softmax(-1)
                model.to(dtype)
                _note_difference(bench, "naive against float32", bench.expected["naive"], bench.expected["float32"])
        step = bench.optimizer_step(batch_size=1, recompute=1.0)
        data = bench.decisions(4)
        peak: dict[str, float] = {}

        def sample() -> None:
            for one in data.split(1):
                step.backward_pass(one, rows=1)
                bench_empty_cache(bench)

        with bench.peak(peak):
            bench.naive["update"] = bench.milliseconds(sample, 1, 1) / len(data)
        bench.naive["update peak"] = peak.get("reserved", 0.0)
    for name, value in bench.naive.items():
        bench.report.note(f"naive {name}, {'GiB' if 'peak' in name else 'ms'}", round(value, 2))
    set_adapters(model, torch.float32)


def bench_empty_cache(bench: Bench) -> None:
    """Empty the cache, as the plain loop does after every sample."""
    if bench.on_gpu:
        torch.cuda.empty_cache()


def measure_rollout(bench: Bench) -> None:
    """Measure a forward without gradient, per decision."""
    bench.accelerate()
    for batch, wanted in _WANTED_ROLLOUT.items():
        inputs = bench.inputs(batch)
        with torch.no_grad():
            began = time.perf_counter()
            bench.model(*inputs)
            bench.synchronize()
            bench.report.note(f"first forward of {batch}: seconds", round(time.perf_counter() - began, 1))
            if batch == min(_WANTED_ROLLOUT):
                since = time.perf_counter() - bench.started
                bench.report.note("first decision: seconds since the start, earlier parts included", round(since, 1))
            milliseconds = bench.milliseconds(partial(bench.model, *inputs), 10) / batch
        name = f"rollout forward, batch {batch}, per decision{bench.floor(1)}"
        naive = bench.naive.get(f"rollout {batch}")
        bench.report.add(Figure(name, "ms", milliseconds, naive, wanted=wanted if bench.on_gpu else None))
    with torch.no_grad():
        found = bench.model(*bench.inputs(2)).action_logits.log_softmax(-1)
    for name, expected in bench.expected.items():
        _note_difference(bench, f"fast against {name}", found, expected)


def _note_difference(bench: Bench, what: str, found: Tensor, expected: Tensor) -> None:
    change = (found - expected).abs()
    bench.report.note(f"log-probabilities, {what}: mean and largest difference",
                      [round(change.mean().item(), 5), round(change.max().item(), 4)])  # fmt: skip


def measure_update(bench: Bench) -> None:
    """Forward, loss and backward of a decision, and the optimizer's share, at the presets' settings."""
    bench.accelerate()
    count = bench.num_decisions
    _compare_with_rollout(bench)
    presets: tuple[tuple[str, int, _Wanted, dict[str, Any]], ...] = (
        ("80gb preset", count, _Wanted(20.0, passes=2), {}),
        ("24gb preset", count, _Wanted(35.0, 22.0, passes=3), {"memory_gb": 22.0}),
        # The least memory that a 24 GB card is promised to need. One at a time: a few decisions say as much.
        (
            "24gb preset, batch_size 1, memory_gb 18",
            min(count, 8),
            _Wanted(None, 18.0, 2),
            {"memory_gb": 18.0, "batch_size": 1},
        ),
    )
    for name, decisions, wanted, settings in presets:
        _measure_update(bench, decisions, name, wanted, settings)


def _compare_with_rollout(bench: Bench) -> None:
    """How far the update's log-probabilities are from those that a rollout with the same weights has stored."""
    data = bench.decisions(4).to(bench.device)
    with torch.enable_grad():
        found = bench.policy.actor.get_dist(data.clone(False)).log_prob(data["vla_action", "tokens"])
    _note_difference(bench, "update against rollout", found.detach(), data["vla_action", "log_probs"])


class _Wanted(NamedTuple):
    """Of an update: milliseconds per decision, GiB, and the forwards of arithmetic that its floor counts."""

    milliseconds: float | None
    memory: float | None = None
    passes: int = 2


def _measure_update(bench: Bench, count: int, name: str, wanted: _Wanted, settings: dict[str, Any]) -> None:
    # The policy has learned since the preset before: decisions of its own, or ratios say how far it has moved.
    # Of recorded rollouts only those stay in memory that this preset's environments would record.
    bench.model.forget_graphs()
    bench.clean()
    data = bench.decisions(count)
    step = bench.optimizer_step(traj_mini_batch_size=8, **settings)
    first = bench.update(step, data)
    chosen = step.micro_batch
    costs = {
        f"{size}/{share:.2f}": f"{cost.seconds / size * 1e3:.1f} ms, {cost.bytes / GIB:.2f} GiB"
        for (size, share), cost in chosen.costs.items()
    }
    bench.report.note(f"{name}: per decision at micro-batch/recomputed share", costs)
    bench.report.note(f"{name}: first step, ratio max, KL, clipped",
                      [first[f"train/{key}"] for key in ("max_ratio", "approx_kl", "clipfrac")])  # fmt: skip
    peak: dict[str, float] = {}
    with bench.peak(peak):
        milliseconds = bench.milliseconds(lambda: bench.update(step, data), 1, 0) / len(data)
    how = f"micro-batch {min(chosen.size, count)}, {chosen.recompute:.0%} recomputed"
    title = f"update, {name} ({how}), per decision and epoch{bench.floor(wanted.passes)}"
    limit = wanted.milliseconds if bench.on_gpu else None
    bench.report.add(Figure(title, "ms", milliseconds, bench.naive.get("update"), wanted=limit))
    if bench.on_gpu:
        bench.report.add(Figure(f"peak memory, {name} ({how})", "GiB", peak["reserved"], wanted=wanted.memory))
        bench.report.note(f"{name}: allocated, GiB", round(peak["allocated"], 2))


def measure_profile(bench: Bench) -> None:
    """Where the time of a rollout and of an update goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    bench.accelerate()
    activities = [ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU]
    step = bench.optimizer_step(batch_size=16, recompute=0.0)
    data = bench.decisions(16).to(bench.device)

    counts = step.loss.count_valid(data)  # type: ignore[operator]

    def update() -> None:
        step.backward_pass(data, rows=len(data), counts=counts)

    measured: dict[str, Callable[[], Any]] = {
        f"rollout of {batch}": partial(_without_gradient, bench.model, bench.inputs(batch)) for batch in _WANTED_ROLLOUT
    }
    measured["update of 16"] = update
    for name, function in measured.items():
        wall = bench.milliseconds(function)
        bench.synchronize()
        began = time.perf_counter()
        function()
        launched = (time.perf_counter() - began) * 1e3
        bench.synchronize()
        bench.report.note(f"profile, {name}: ms, of them until launched", [round(wall, 2), round(launched, 2)])
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


def _without_gradient(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return function(*arguments)


def measure_autoregressive(bench: Bench) -> None:
    """Measure base OpenVLA's seven tokens, one after the other."""
    bench.accelerate()
    pixels, ids, _, _ = bench.inputs(1)
    milliseconds = bench.milliseconds(lambda: bench.model.generate_autoregressive(pixels, ids), 3, 2)
    wanted = 60.0 if bench.on_gpu else None
    bench.report.add(Figure("autoregressive decoding, per action (floor 35)", "ms", milliseconds, wanted=wanted))


def measure_attention(bench: Bench) -> None:
    """Measure the kernels that scaled-dot-product attention can take, at the decoder's shapes, forward and backward."""
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
    """Measure the 24gb preset with the card's memory cut to 24 GiB: what does not fit fails."""
    if not bench.on_gpu:
        raise UserError("only a GPU's memory can be cut")
    bench.accelerate()
    bench.clean()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(24 * GIB / total)
    try:
        wanted = _Wanted(35.0, 24.0, passes=3)
        _measure_update(bench, 32, "24gb preset, card cut to 24 GiB", wanted, {"memory_gb": 22.0})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measure_loop(bench: Bench) -> None:
    """Rollout in LIBERO and one update, end to end, through the loop that `torchrl-vla train` runs."""
    from torchrl_vla.bench.gpu_loop import measure

    measure(bench)


MEASURES: dict[str, Callable[[Bench], None]] = {
    "floor": measure_floor, "naive": measure_naive, "rollout": measure_rollout, "update": measure_update,
    "profile": measure_profile, "autoregressive": measure_autoregressive, "attention": measure_attention,
    "capped": measure_capped, "loop": measure_loop,
}  # fmt: skip
