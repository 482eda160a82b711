"""OpenVLA and OpenVLA-OFT: images, a prompt and the robot's state to a chunk of actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchrl_vla.errors import UserError
from torchrl_vla.modules.distributions import check_temperature
from torchrl_vla.modules.heads import L1ActionHead, ProprioProjector
from torchrl_vla.modules.openvla.acceleration import Acceleration
from torchrl_vla.modules.openvla.architecture import OpenVLAConfig
from torchrl_vla.modules.openvla.attention import ATTENTION_IMPLEMENTATIONS
from torchrl_vla.modules.openvla.blocks import LayerStack
from torchrl_vla.modules.openvla.decoding import Decoded, choose_token, decode_autoregressively
from torchrl_vla.modules.openvla.language import (
    Prompt,
    arrange_prompt,
    build_language_model,
    decode_bidirectional,
    sequence_mask,
)
from torchrl_vla.modules.openvla.linear import linear_rows
from torchrl_vla.modules.openvla.vision import VisionBackbone, VisionProjector


class OpenVLAOutput(NamedTuple):
    """What one parallel decoding gives.

    Args:
        action_logits: float32 [B, K, action_dim, n_action_bins], bins in token-id order (from high to low action).
        hidden_states: [B, K*action_dim, D] of the same rows, after the final norm.
    """

    action_logits: Tensor
    hidden_states: Tensor


class OpenVLA(nn.Module):
    """DINOv2 and SigLIP towers, a projector and Llama, decoding a chunk of actions in one bidirectional pass.

    Args:
        config: the architecture.
        attn_implementation: attention kernel, ``sdpa``, ``flash_attention_2`` or ``eager``.
        use_l1_head: build the L1 regression head beside the token head.

    Raises:
        ValueError: if the attention kernel is unknown.

    Example:
        >>> config = OpenVLAConfig.tiny()
        >>> model = OpenVLA(config)
        >>> pixels, prompt = torch.zeros(2, 6, 126, 126), torch.tensor([[1, 5, 3], [1, 7, 3]])
        >>> model(pixels, prompt, torch.ones_like(prompt), torch.zeros(2, 8)).action_logits.shape
        torch.Size([2, 8, 7, 256])

    References: `OpenVLA <https://arxiv.org/abs/2406.09246>`_, `OpenVLA-OFT <https://arxiv.org/abs/2502.19645>`_.
    """

    def __init__(self, config: OpenVLAConfig, *, attn_implementation: str = "sdpa", use_l1_head: bool = False) -> None:
        super().__init__()
        if attn_implementation not in ATTENTION_IMPLEMENTATIONS:
            raise UserError(
                f"attn_implementation must be one of {', '.join(ATTENTION_IMPLEMENTATIONS)}, "
                f"got {attn_implementation!r}."
            )
        self.config = config
        self.vision_backbone = VisionBackbone(config, attn_implementation)
        self.projector = VisionProjector(config.vision_dim, config.hidden_size)
        self.language_model = build_language_model(config.llama_config(attn_implementation))
        self.proprio_projector = (
            ProprioProjector(config.proprio_dim, config.hidden_size) if config.use_proprio else None
        )
        self.action_head = L1ActionHead(config.hidden_size, config.action_dim) if use_l1_head else None
        # Tensors of a checkpoint that no forward reads, by upstream's name, on the CPU: kept to be written back.
        self.unused_weights: dict[str, Tensor] = {}
        # The N of the files of the heads.
        self.checkpoint_step = "0"
        self.is_loaded_in_4bit = False
        self._acceleration: Acceleration | None = None
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Llama's initialisation for everything (normal, std 0.02; zero biases), LayerNorms and LayerScale at one.

        A model on the meta device is left as it is.
        """
        std = self.language_model.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                return
            if "norm" in name or name.endswith("lambda1") or ".ffn.0." in name:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    @property
    def device(self) -> torch.device:
        """Where the token embeddings, and so the inputs, live."""
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token embeddings, in which the decoder computes."""
        return self.language_model.model.embed_tokens.weight.dtype

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Tower features of the images, which can be computed once and passed to :meth:`forward`.

        Args:
            pixel_values: [B, 6k, image_size, image_size], normalised; DINOv2's channels first in each image.

        Returns:
            [B, k*N, D_dino + D_siglip] in the model's dtype.

        Raises:
            ValueError: if the shape does not fit the model.
        """
        return self._run(self._encode_images, pixel_values)[0]

    def _encode_images(self, pixel_values: Tensor) -> tuple[Tensor]:
        size = self.config.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[1] % 6 or tuple(pixel_values.shape[2:]) != (size, size):
            raise UserError(
                f"pixel_values must be [batch, 6 * images, {size}, {size}] for this checkpoint, "
                f"got {tuple(pixel_values.shape)}: resize the images with the processor."
            )
        return (self.vision_backbone(pixel_values.to(self.dtype)),)

    def embed(
        self,
        prompt: Prompt,
        vision_features: Tensor,
        proprio: Tensor | None = None,
        *,
        num_action_slots: int,
    ) -> Tensor:
        """Return the decoder's input: ``[BOS][patches][proprio?][rest of prompt][zeros][</s>]``.

        Args:
            prompt: an arranged prompt.
            vision_features: [B, k*N, D_dino + D_siglip].
            proprio: [B, proprio_dim], normalised, or None.
            num_action_slots: zero embeddings after the prompt, closed by ``</s>``; with 0 the prompt comes last.

        Returns:
            [B, S, D].
        """
        embed_tokens = self.language_model.model.embed_tokens
        parts = [embed_tokens(prompt.first), self.projector(vision_features)]
        if proprio is not None:
            if self.proprio_projector is None:
                raise UserError(
                    "proprio was given, but this model has no proprio_projector: load a checkpoint with "
                    "proprio_projector--N_checkpoint.pt, or leave proprio out."
                )
            parts.append(self.proprio_projector(proprio).to(self.dtype)[:, None])
        parts.append(embed_tokens(prompt.rest))
        if num_action_slots:
            batch = len(prompt.first)
            parts.append(parts[0].new_zeros(batch, num_action_slots, self.config.hidden_size))
            parts.append(embed_tokens(torch.full_like(prompt.first, self.config.eos_token_id)))
        return torch.cat(parts, dim=1)

    def forward(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        proprio: Tensor | None = None,
        *,
        vision_features: Tensor | None = None,
    ) -> OpenVLAOutput:
        """Decode a chunk of ``K`` control steps in parallel.

        Args:
            pixel_values: [B, 6k, H, W] normalised; None if ``vision_features`` are given.
            input_ids: int64 [B, L], prompts padded on either side.
            attention_mask: [B, L], nonzero at real tokens; 29871 is appended where a prompt does not end with it. None
                promises prompts of one length that all end with it, and runs attention without a mask.
            proprio: [B, proprio_dim] normalised state, or None.
            vision_features: what :meth:`encode_images` gave for the same images.

        Returns:
            Logits of the action tokens and the hidden states they are computed from.

        Raises:
            ValueError: if shapes do not fit the model or each other.
        """
        return OpenVLAOutput(
            *self._run(self._forward, pixel_values, input_ids, attention_mask, proprio, vision_features)
        )

    def _run(self, function: Callable[..., Sequence[Tensor]], *inputs: Tensor | None) -> Sequence[Tensor]:
        return function(*inputs) if self._acceleration is None else self._acceleration.run(function, inputs)

    def _forward(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        proprio: Tensor | None,
        vision_features: Tensor | None,
    ) -> OpenVLAOutput:
        prompt, features = self._inputs(pixel_values, input_ids, attention_mask, vision_features)
        slots = self.config.num_action_tokens
        inputs_embeds = self.embed(prompt, features, proprio, num_action_slots=slots)
        num_patches = inputs_embeds.shape[1] - 1 - prompt.rest.shape[1] - slots - 1
        mask = sequence_mask(prompt, num_patches, slots + 1)
        # The row that ends the prompt gives the first action token, each action slot the next one.
        hidden_states = decode_bidirectional(self.language_model, inputs_embeds, mask, (-slots - 2, -2))
        logits = self._action_logits(hidden_states).float()
        shape = (len(logits), self.config.chunk_size, self.config.action_dim, self.config.n_action_bins)
        return OpenVLAOutput(logits.view(shape), hidden_states)

    def _inputs(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        vision_features: Tensor | None,
    ) -> tuple[Prompt, Tensor]:
        if (pixel_values is None) == (vision_features is None):
            raise UserError("give either pixel_values or vision_features, and None for the other.")
        pad_token_id = self.config.pad_token_id
        assert pad_token_id is not None
        prompt = arrange_prompt(input_ids, attention_mask, self.config.empty_token_id, pad_token_id)
        if vision_features is None:
            assert pixel_values is not None
            vision_features = self.encode_images(pixel_values)
        if len(input_ids) != len(vision_features):
            raise UserError(f"{len(input_ids)} prompts were given with images of {len(vision_features)} samples.")
        return prompt, vision_features

    def _action_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the head's rows of the action tokens only."""
        begin = self.config.action_token_begin
        return linear_rows(self.language_model.lm_head, hidden_states, begin, begin + self.config.n_action_bins)

    def predict_l1(self, hidden_states: Tensor) -> Tensor:
        """Normalised actions [B, K, action_dim] of the L1 head for ``OpenVLAOutput.hidden_states``.

        Raises:
            ValueError: if the model has no L1 head.
        """
        if self.action_head is None:
            raise UserError(
                "this model has no L1 head: load a checkpoint with action_head--N_checkpoint.pt and "
                "load_l1_action_head=True, or use the token logits."
            )
        return self.action_head(hidden_states)

    @torch.no_grad()
    def generate_autoregressive(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vision_features: Tensor | None = None,
        temperature: float = 0.0,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Decode as base OpenVLA does: seven tokens of one control step, one after the other.

        Args:
            pixel_values: [B, 6k, H, W] normalised; None if ``vision_features`` are given.
            input_ids: int64 [B, L], prompts padded on either side; 29871 is appended where it is missing.
            attention_mask: [B, L], nonzero at real tokens; None for prompts of one length.
            vision_features: what :meth:`encode_images` gave for the same images.
            temperature: 0 takes the most likely token of the whole vocabulary, as upstream does; above 0, action tokens
                alone are drawn, as in parallel decoding.
            uniform: numbers in [0, 1) to draw with, float32 [B, 7]; None takes them from torch's global generator.

        Returns:
            Token ids int64 [B, 7].

        Raises:
            ValueError: if shapes do not fit the model or each other, or the temperature is negative.
        """
        return self.decode_autoregressively(
            pixel_values,
            input_ids,
            attention_mask,
            vision_features=vision_features,
            temperature=temperature,
            uniform=uniform,
        ).tokens

    @torch.no_grad()
    def decode_autoregressively(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vision_features: Tensor | None = None,
        temperature: float = 0.0,
        uniform: Tensor | None = None,
    ) -> Decoded:
        """Give the tokens of :meth:`generate_autoregressive`, whose arguments these are, and their logits."""
        check_temperature(temperature)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        heat = None
        if temperature == 0:
            uniform = None
        else:
            # Tensors, so that a recorded graph can be replayed with others.
            heat = torch.full((), temperature, device=input_ids.device)
            if uniform is None:
                uniform = torch.rand(len(input_ids), self.config.action_dim, device=input_ids.device)
        decoded = self._run(self._decode, pixel_values, input_ids, attention_mask, vision_features, heat, uniform)
        return Decoded(*decoded)

    def _decode(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        vision_features: Tensor | None,
        heat: Tensor | None,
        uniform: Tensor | None,
    ) -> Decoded:
        prompt, features = self._inputs(pixel_values, input_ids, attention_mask, vision_features)
        inputs_embeds = self.embed(prompt, features, num_action_slots=0)
        mask = sequence_mask(prompt, inputs_embeds.shape[1] - 1 - prompt.rest.shape[1], 0)
        if mask is None:
            mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.bool)
        choose = choose_token(self.config.action_token_begin, self.config.n_action_bins, heat, uniform)
        return decode_autoregressively(self.language_model, inputs_embeds, mask, self.config.action_dim, choose)

    @property
    def _stacks(self) -> list[LayerStack]:
        towers = self.vision_backbone
        return [towers.featurizer.stack, towers.fused_featurizer.stack, self.language_model.stack]

    def gradient_checkpointing_enable(self, share: float = 1.0) -> None:
        """Compute layers again in the backward pass, instead of keeping their activations.

        Args:
            share: of each tower's and the decoder's layers, from 0 (none) to 1 (all).

        Raises:
            ValueError: if it is not a share.
        """
        if not 0 <= share <= 1:
            raise UserError(f"share must be from 0 (recompute nothing) to 1 (recompute every layer), got {share}.")
        for stack in self._stacks:
            stack.recompute = float(share)

    def accelerate(self, *, compile_layers: bool = True, graph_batch_size: int = 0) -> None:
        """Make forward and backward fast; call it once the weights are loaded, the adapters added and all in place.

        Frozen weights that read the same input are fused, adapters get a copy in the dtype of the weights, which is
        made anew before every forward, so that however they were written they count, and each kind of layer is
        compiled, once for all layers and batch sizes. The outputs stay what they were, up to rounding. Do not move the
        model or cast it afterwards. Adapters that are added or weights that are exchanged later are noticed, and
        computed with as they are: call it again to have them fused.

        Args:
            compile_layers: compile the layers.
            graph_batch_size: up to this batch size, forwards without gradient on a GPU are replayed as CUDA graphs;
                flash-attention 2 asks the host about padding, which cannot be recorded.
        """
        if self.language_model.config._attn_implementation != "sdpa":
            graph_batch_size = 0
        self._acceleration = Acceleration(
            self, self._stacks, compile_layers=compile_layers, graph_batch_size=graph_batch_size
        )

    def refresh_adapters(self) -> None:
        """Bring copies of the adapters up to date.

        A forward does; whoever replays a recording of one has to, before each replay.
        """
        if self._acceleration is not None:
            self._acceleration.refresh()

    def forget_graphs(self) -> None:
        """Give the memory of recorded forwards back; the next forward of each shape is recorded again."""
        if self._acceleration is not None:
            self._acceleration.forget_graphs()

    @property
    def accelerated(self) -> bool:
        """Whether :meth:`accelerate` was called."""
        return self._acceleration is not None
