"""The phases of `torchrl-vla bench checkpoint`, each to be run in a process of its own."""

from __future__ import annotations

import functools
import gc
import resource
import time
from pathlib import Path
from typing import Any

import torch

from torchrl_vla.checkpoints.memory_estimate import PROMPT_TOKENS, estimate_memory
from torchrl_vla.checkpoints.openvla_format import load_openvla, save_openvla
from torchrl_vla.modules import OpenVLA, OpenVLAConfig
from torchrl_vla.modules.openvla.lora import add_lora
from torchrl_vla.modules.openvla.quantization import check_4bit

__all__ = ["load", "load_4bit", "predict", "save"]

_SEED = 0


def save(name: str, device: str, folder: str) -> dict[str, Any]:
    """Make a model with random weights and write it.

    Args:
        name: of the architecture.
        device: where to make it.
        folder: where to write it.

    Returns:
        Seconds, bytes of the files, number of shards, bytes of the largest, and bytes of host memory that writing took.
    """
    model = _make(name, device)
    began, before = time.perf_counter(), _host_memory("VmRSS")
    save_openvla(model, folder)
    seconds = time.perf_counter() - began
    sizes = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    return {
        "seconds": seconds,
        "bytes": sum(path.stat().st_size for path in Path(folder).iterdir()),
        "shards": len(sizes),
        "largest_shard": max(sizes),
        "host": _host_memory("VmHWM") - before,
    }


def load(name: str, device: str, folder: str) -> dict[str, Any]:
    """Load it in its own dtype, then compare every parameter with those of the model that was written.

    Args:
        name: of the architecture.
        device: where to load it.
        folder: where it is.

    Returns:
        Seconds, bytes of the weights, bytes of host and GPU memory that loading took at most, number of parameters
        (tensors) and how many of them are equal to the bit.
    """
    torch.empty(1, device=device)  # CUDA's own start is not loading
    before = _host_memory("VmRSS")
    began = time.perf_counter()
    model = load_openvla(folder, dtype="stored", device=device)
    _synchronize(device)
    seconds = time.perf_counter() - began
    host, gpu = _host_memory("VmHWM") - before, _gpu_peak(device)
    written = dict(_make(name, device).named_parameters())
    equal = [torch.equal(parameter, written[key].to(parameter.dtype)) for key, parameter in model.named_parameters()]
    return {
        "seconds": seconds,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "host": host,
        "gpu": gpu,
        "parameters": len(written),
        "equal": sum(equal),
    }


def predict(device: str, folder: str, batch_size: int) -> dict[str, tuple[int, int]]:
    """Peak GPU memory of a rollout's forward pass and of two training steps, and what the doctor says.

    Args:
        device: of the model.
        folder: where the checkpoint is.
        batch_size: decisions at a time.

    Returns:
        Measured and predicted bytes by phase; measured 0 without a GPU.
    """
    model = load_openvla(folder, device=device, attn_implementation="sdpa")
    config, dtype = model.config, model.dtype
    estimate = functools.partial(estimate_memory, config, batch_size=batch_size, dtype=dtype)
    size = config.image_size
    pixels = torch.randn(batch_size, 6, size, size, device=device)
    prompt = torch.full((batch_size, PROMPT_TOKENS), config.empty_token_id, device=device)
    proprio = torch.zeros(batch_size, config.proprio_dim, device=device) if config.use_proprio else None
    found = {}
    with torch.no_grad():
        _gpu_peak(device)
        model(pixels, prompt, None, proprio)
        predicted = estimate(training=False).total
        found["forward pass"] = (_gpu_peak(device), predicted)
    add_lora(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for recompute in (1.0, 0.0):
        model.gradient_checkpointing_enable(recompute)
        for _ in range(2):  # the second has gradients and moments already
            _gpu_peak(device)
            model(pixels, prompt, None, proprio).action_logits.log_softmax(dim=-1).sum().backward()
            optimizer.step()
        predicted = estimate(training=True, recompute=recompute).total
        found[f"LoRA step{', all layers recomputed' if recompute else ''}"] = (_gpu_peak(device), predicted)
    return found


def load_4bit(device: str, folder: str) -> dict[str, Any] | str:
    """Load it with 4-bit weights.

    Args:
        device: where to load it.
        folder: where it is.

    Returns:
        Seconds and bytes of GPU memory, held and at most, and as the doctor says; or why it cannot be done.
    """
    try:
        check_4bit(torch.device(device))
    except ValueError as error:
        return str(error)
    began = time.perf_counter()
    model = load_openvla(folder, device=device, load_in_4bit=True)
    _synchronize(device)
    seconds = time.perf_counter() - began
    gc.collect()
    held, peak = torch.cuda.memory_allocated(device), _gpu_peak(device)
    predicted = estimate_memory(model.config, batch_size=1, training=False, load_in_4bit=True).weights
    return {"seconds": seconds, "gpu": held, "peak": peak, "predicted": predicted}


def _make(name: str, device: str) -> OpenVLA:
    """Return the same weights every time, in the dtype they are stored in."""
    config = OpenVLAConfig.preset(name, torch_dtype="bfloat16")
    torch.manual_seed(_SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return OpenVLA(config)
    finally:
        torch.set_default_dtype(before)


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _gpu_peak(device: str) -> int:
    """Most bytes that lived on the GPU since the last call."""
    if torch.device(device).type != "cuda":
        return 0
    _synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _host_memory(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
