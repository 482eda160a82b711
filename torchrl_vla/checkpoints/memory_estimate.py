"""Memory that an OpenVLA needs, counted by running its steps on tensors without data."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedConfig

from torchrl_vla.modules.openvla.architecture import OpenVLAConfig
from torchrl_vla.modules.openvla.lora import add_lora, freeze_backbone
from torchrl_vla.modules.openvla.model import OpenVLA
from torchrl_vla.modules.openvla.quantization import quantized_linears

__all__ = ["PROMPT_TOKENS", "MemoryEstimate", "estimate_memory"]

#: Tokens of a prompt; LIBERO's longest instruction has 19 words.
PROMPT_TOKENS = 48
#: NF4 keeps half a byte per weight and a float32 scale per 64 of them.
_NF4_BYTES = 0.5 + 4 / 64
#: AdamW's two moments have the parameter's dtype, as its gradient does.
_ADAM_MOMENTS = 2
_FUSED_ATTENTION = "fused_without_data"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the model's device.

    Args:
        weights: parameters, adapters and heads included.
        gradients: of what learns.
        optimizer: AdamW's moments.
        activations: highest sum of everything else that lives at one time.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Everything together; what the CUDA context and fragmentation take comes on top."""
        return self.weights + self.gradients + self.optimizer + self.activations


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and that are still referred to.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Identities of live storages; a known tensor's storage outlives the count.
        self._keep = [tensor.untyped_storage() for tensor in known]
        self._seen = {storage._cdata for storage in self._keep}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata
        if identity in self._seen:
            return
        self._seen.add(identity)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, identity, storage.nbytes())

    def _forget(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return what flash attention allocates; on the meta device SDPA would make the whole matrix of weights."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return output.transpose(1, 2), None


def _fuse_attention(model: nn.Module) -> None:
    AttentionInterface.register(_FUSED_ATTENTION, _fused_attention)
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = _FUSED_ATTENTION


def estimate_memory(
    config: OpenVLAConfig,
    *,
    batch_size: int,
    training: bool,
    dtype: torch.dtype = torch.bfloat16,
    num_images: int = 1,
    load_l1_action_head: bool = False,
    load_in_4bit: bool = False,
    use_lora: bool = True,
    lora_rank: int = 32,
    freeze_vla_backbone: bool = False,
    recompute: float = 0.0,
    autoregressive: bool = False,
) -> MemoryEstimate:
    """Count the memory of a rollout's forward pass, or of a training step with AdamW.

    Weights are counted exactly. Activations are those of the real operations, run on the meta device with attention
    fused; a kernel's own workspace, the CUDA context and fragmentation are not in it.

    Args:
        config: the architecture.
        batch_size: decisions at a time.
        training: a forward and backward pass, else a forward pass without gradients.
        dtype: of the weights.
        num_images: images per observation.
        load_l1_action_head: whether the L1 head is loaded.
        load_in_4bit: the linear layers are quantised (NF4).
        use_lora: adapters learn (float32), else every weight does.
        lora_rank: their rank.
        freeze_vla_backbone: nothing but the heads learns.
        recompute: share of the layers, 0 to 1, that are computed again in the backward pass.
        autoregressive: the forward pass is base OpenVLA's decoding, with its cache; not for training.

    Example:
        >>> config = OpenVLAConfig.tiny()
        >>> rollout = estimate_memory(config, batch_size=8, training=False, dtype=torch.float32)
        >>> rollout.gradients, rollout.weights == 4 * sum(p.numel() for p in OpenVLA(config).parameters())
        (0, True)
    """
    with torch.device("meta"):
        model = OpenVLA(config, use_l1_head=load_l1_action_head).to(dtype)
    # Layers that bitsandbytes would make are counted by hand: it cannot be asked without a GPU.
    saved = sum(
        layer.weight.numel() * (layer.weight.element_size() - _NF4_BYTES) for layer in quantized_linears(model).values()
    )
    if training and freeze_vla_backbone:
        freeze_backbone(model)
    elif training and use_lora:
        add_lora(model, rank=lora_rank)
    model.requires_grad_(False) if not training else model.train()
    model.gradient_checkpointing_enable(recompute)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    learning = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in learning)
    for parameter in learning:
        parameter.grad = torch.empty_like(parameter)
    activations = _activations(
        model, batch_size, num_images, training=training and bool(learning), autoregressive=autoregressive
    )
    return MemoryEstimate(
        weights=round(weights - (saved if load_in_4bit else 0)),
        gradients=gradients,
        optimizer=_ADAM_MOMENTS * gradients,
        activations=activations,
    )


def _activations(model: OpenVLA, batch_size: int, num_images: int, *, training: bool, autoregressive: bool) -> int:
    config = model.config
    size = config.image_size
    pixels = torch.empty(batch_size, 6 * num_images, size, size, device="meta")
    prompt = torch.empty(batch_size, PROMPT_TOKENS, dtype=torch.long, device="meta")
    proprio = torch.empty(batch_size, config.proprio_dim, device="meta") if config.use_proprio else None
    parameters = list(model.parameters())
    known = [*parameters, *(p.grad for p in parameters if p.grad is not None), pixels, prompt]
    _fuse_attention(model)
    with _LiveBytes(known) as live, torch.set_grad_enabled(training):
        if autoregressive:
            model.generate_autoregressive(pixels, prompt)
            return live.peak
        output = model(pixels, prompt, None, proprio)
        if training:
            loss = output.action_logits.log_softmax(dim=-1).sum()
            if loss.requires_grad:
                loss.backward()
    return live.peak
