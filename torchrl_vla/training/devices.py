"""Devices of a run, checked before anything long is started."""

from __future__ import annotations

import torch

from torchrl_vla.errors import UserError

__all__ = ["choose_device", "choose_head_device"]


def choose_device(name: str, gpu_id: int = 0) -> torch.device:
    """Return the device a name means; auto is the GPU `gpu_id` if there is one, else the CPU.

    A GPU becomes the current one, on which streams are made and graphs are recorded, float32 products round to TF32,
    and attention goes without cuDNN: with a mask, as prompts of several lengths need, and 64 tokens more than a
    multiple of 128, its backward pass returns NaN (https://github.com/pytorch/pytorch/issues/196678).

    Raises:
        ValueError: there is no such device.

    Examples:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = f"cuda:{gpu_id}" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= count:
        have = f"cuda:0..cuda:{count - 1}" if count else "no GPU: use --device cpu"
        raise UserError(f"device {name!r} is not on this machine, which has {have}.")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def choose_head_device(device: torch.device, *, use_multi_gpu: bool, secondary_gpu_id: int) -> torch.device:
    """Return the device of the small heads beside the language model.

    Args:
        device: of the policy.
        use_multi_gpu: put the heads on a GPU of their own.
        secondary_gpu_id: that GPU.

    Raises:
        ValueError: there is no such GPU, or the policy is on it or on none.

    Examples:
        >>> choose_head_device(torch.device("cpu"), use_multi_gpu=False, secondary_gpu_id=1)
        device(type='cpu')
    """
    if not use_multi_gpu:
        return device
    count = torch.cuda.device_count()
    have = f"{count} GPU{'s' * (count != 1)}"
    if secondary_gpu_id >= count:
        raise UserError(
            f"use_multi_gpu puts the heads on secondary_gpu_id={secondary_gpu_id}, but this machine has {have}: leave "
            "use_multi_gpu out, and the heads stay beside the policy."
        )
    secondary = torch.device("cuda", secondary_gpu_id)
    if device.type != "cuda" or (device.index or 0) == secondary_gpu_id:
        raise UserError(
            f"use_multi_gpu needs the policy on another GPU than the heads (secondary_gpu_id={secondary_gpu_id}), but "
            f"it is on {device}: choose another --gpu-id or --device."
        )
    return secondary
