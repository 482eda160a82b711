"""Architecture of an OpenVLA / OpenVLA-OFT model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import LlamaConfig

from torchrl_vla.errors import UserError

__all__ = ["LLM_FIELDS", "OpenVLAConfig", "VisionTowerConfig"]

_DTYPES = ("float32", "bfloat16", "float16")
LLM_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
"""Fields that are called as in transformers' ``LlamaConfig``."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")


@dataclass(frozen=True)
class VisionTowerConfig:
    """One vision transformer, in timm's terms.

    Args:
        embed_dim: width; a multiple of ``num_heads``.
        depth: number of blocks in the checkpoint, at least 2. The features are the output of block ``depth - 2``, so
            the last block is stored but never run.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP is ``int(embed_dim * mlp_ratio)``.
        patch_size: side of a square patch in pixels.
        num_prefix_tokens: 5 for DINOv2 (class token and 4 registers), 0 for SigLIP.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 14
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_heads", "patch_size", "depth", "num_prefix_tokens"):
            _require_whole(name, getattr(self, name))
        for name in ("embed_dim", "num_heads", "patch_size"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}.")
        _require(self.depth >= 2, f"depth must be at least 2 (block depth-2 gives the features), got {self.depth}.")
        _require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}.",
        )
        _require(0 < self.mlp_ratio < math.inf, f"mlp_ratio must be positive and finite, got {self.mlp_ratio}.")
        _require(
            self.num_prefix_tokens in (0, 5),
            f"num_prefix_tokens must be 0 or 5 (class token and four registers), got {self.num_prefix_tokens}.",
        )

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP (timm truncates: 1152 x 3.7362 is 4304)."""
        return int(self.embed_dim * self.mlp_ratio)


_DINOV2_L = VisionTowerConfig(embed_dim=1024, depth=24, num_heads=16, num_prefix_tokens=5)
_SIGLIP_SO400M = VisionTowerConfig(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362)


@dataclass(frozen=True)
class OpenVLAConfig:
    """Everything that fixes the shapes of an :class:`OpenVLA`; the defaults are the released 7B model's.

    Args:
        image_size: side of the square input image in pixels, a multiple of both towers' patch size.
        dinov2: the tower that reads channels 0:3 of each image.
        siglip: the tower that reads channels 3:6.
        hidden_size: width ``D`` of the language model.
        intermediate_size: hidden width of its SwiGLU.
        num_hidden_layers: its decoder layers.
        num_attention_heads: its attention heads; ``hidden_size`` is a multiple.
        num_key_value_heads: its key/value heads; None for as many as attention heads.
        rms_norm_eps: epsilon of its RMSNorm; the released models use 1e-6.
        max_position_embeddings: longest sequence, image patches and action slots included.
        vocab_size: rows of the token embedding and of the head, the padding rows at the end included.
        pad_to_multiple_of: number of those padding rows. The ``n_action_bins`` rows before them are the action tokens.
        n_action_bins: action tokens (256).
        pad_token_id: id of the padding token, the first padding row; None for that row.
        bos_token_id: first token of a prompt.
        eos_token_id: token that closes the sequence.
        empty_token_id: token that every prompt ends with (29871, an empty piece, in Llama-2's vocabulary).
        chunk_size: control steps ``K`` that one decision gives.
        action_dim: numbers per control step (7).
        num_images: images per observation.
        use_proprio: whether the robot's state is fed as one more token after the patches.
        proprio_dim: length of that state.
        proprio_format: how it was written in training, where that is on record: ``"axis_angle"`` or ``"quaternion"``.
        torch_dtype: dtype of the checkpoint's weights: float32, bfloat16 or float16.
        trained_for: the way of acting that was trained last, where it is on record: ``"tokens"`` or ``"l1"``.
        norm_stats: un-normalisation statistics by data set, as ``config.json`` has them.
        dataset_statistics: those of ``dataset_statistics.json``, which go before ``norm_stats``.
        upstream: other keys of a ``config.json`` that was read, kept for writing it back.

    Raises:
        ValueError: if a field is out of range or does not fit another one.
        TypeError: if a field is not a number that has to be one.

    Example:
        >>> OpenVLAConfig.tiny().action_token_begin
        256
        >>> OpenVLAConfig.preset("7b").action_token_begin
        31744
    """

    image_size: int = 224
    dinov2: VisionTowerConfig = _DINOV2_L
    siglip: VisionTowerConfig = _SIGLIP_SO400M
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    vocab_size: int = 32064
    pad_to_multiple_of: int = 64
    n_action_bins: int = 256
    pad_token_id: int | None = None
    bos_token_id: int = 1
    eos_token_id: int = 2
    empty_token_id: int = 29871
    chunk_size: int = 8
    action_dim: int = 7
    num_images: int = 1
    use_proprio: bool = False
    proprio_dim: int = 8
    proprio_format: Literal["axis_angle", "quaternion"] | None = None
    torch_dtype: str = "bfloat16"
    trained_for: Literal["tokens", "l1"] | None = None
    norm_stats: dict[str, Any] = field(default_factory=dict, repr=False)
    dataset_statistics: dict[str, Any] = field(default_factory=dict, repr=False)
    upstream: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in (
            "image_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
            "n_action_bins", "chunk_size", "action_dim", "num_images", "proprio_dim", "max_position_embeddings",
        ):  # fmt: skip
            _require_whole(name, getattr(self, name))
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}.")
        for name in (
            "pad_to_multiple_of", "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id",
            "empty_token_id",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                _require_whole(name, getattr(self, name))
        for name, tower in (("dinov2", self.dinov2), ("siglip", self.siglip)):
            _require(
                self.image_size % tower.patch_size == 0,
                f"image_size {self.image_size} is not a multiple of {name}.patch_size {tower.patch_size}.",
            )
        _require(
            self.dinov2.patch_size == self.siglip.patch_size,
            f"both towers must cut the same patches, got {self.dinov2.patch_size} and {self.siglip.patch_size} pixels.",
        )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _require(
            self.hidden_size % heads == 0 and self.hidden_size // heads % 2 == 0,
            f"hidden_size {self.hidden_size} must split into {heads} heads of even width.",
        )
        _require(
            kv_heads is None or (kv_heads > 0 and heads % kv_heads == 0),
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}.",
        )
        _require(
            0 < self.rms_norm_eps < math.inf, f"rms_norm_eps must be positive and finite, got {self.rms_norm_eps}."
        )
        _require(
            self.pad_to_multiple_of >= 0, f"pad_to_multiple_of must not be negative, got {self.pad_to_multiple_of}."
        )
        _require(
            self.action_token_begin > 0,
            f"vocab_size {self.vocab_size} leaves no text tokens beside {self.n_action_bins} action tokens and "
            f"{self.pad_to_multiple_of} padding rows.",
        )
        patches = self.num_images * self.patches_per_image
        _require(
            patches + self.num_action_tokens < self.max_position_embeddings,
            f"chunk_size {self.chunk_size} gives {self.num_action_tokens} action tokens, which beside {patches} image "
            f"patches and a prompt exceed max_position_embeddings {self.max_position_embeddings}.",
        )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "empty_token_id"):
            token = getattr(self, name)
            _require(
                token is None or 0 <= token < self.vocab_size, f"{name} {token} is outside 0..{self.vocab_size - 1}."
            )
        _require(self.torch_dtype in _DTYPES, f"torch_dtype must be one of {_DTYPES}, got {self.torch_dtype!r}.")
        _require(
            self.proprio_format in (None, "axis_angle", "quaternion"),
            f"proprio_format must be 'axis_angle' or 'quaternion', or be left out, got {self.proprio_format!r}.",
        )
        _require(
            self.trained_for in (None, "tokens", "l1"),
            f"trained_for must be 'tokens' or 'l1', or be left out, got {self.trained_for!r}.",
        )
        if self.pad_token_id is None:
            object.__setattr__(self, "pad_token_id", min(self.tokenizer_vocab_size, self.vocab_size - 1))

    @classmethod
    def seven_b(cls, **overrides: Any) -> OpenVLAConfig:
        """Return the released 7B architecture (7,541,237,184 parameters, 982 tensors), fields replaced on demand."""
        return cls(**overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> OpenVLAConfig:
        """Return a model of 7.5 million parameters with every part of the 7B one, for a CPU; fields replaced on demand.

        Example:
            >>> OpenVLAConfig.tiny(image_size=224, num_images=2).patches_per_image
            256
        """
        defaults: dict[str, Any] = dict(
            image_size=126,
            dinov2=VisionTowerConfig(embed_dim=128, depth=5, num_heads=4, num_prefix_tokens=5),
            siglip=VisionTowerConfig(embed_dim=128, depth=5, num_heads=4),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            vocab_size=576,
            empty_token_id=3,
            use_proprio=True,
            torch_dtype="float32",
        )
        return cls(**{**defaults, **overrides})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> OpenVLAConfig:
        """Return the preset ``tiny`` or ``7b``, with fields replaced on demand.

        Raises:
            ValueError: for any other name.
        """
        presets = {"tiny": cls.tiny, "7b": cls.seven_b}
        if name not in presets:
            raise UserError(f"unknown preset {name!r}; choose one of {', '.join(presets)}.")
        return presets[name](**overrides)

    @property
    def patches_per_image(self) -> int:
        """Tokens that one image becomes."""
        return (self.image_size // self.dinov2.patch_size) ** 2

    @property
    def vision_dim(self) -> int:
        """Width of the concatenated features of both towers."""
        return self.dinov2.embed_dim + self.siglip.embed_dim

    @property
    def num_action_tokens(self) -> int:
        """Tokens of one decision, ``K * action_dim``."""
        return self.chunk_size * self.action_dim

    @property
    def tokenizer_vocab_size(self) -> int:
        """Tokens of the vocabulary proper (32000), the padding rows left out."""
        return self.vocab_size - self.pad_to_multiple_of

    @property
    def action_token_begin(self) -> int:
        """Id of action bin 0 (31744); bin ``b`` is id ``action_token_begin + b``."""
        return self.tokenizer_vocab_size - self.n_action_bins

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the language model."""
        return self.hidden_size // self.num_attention_heads

    @property
    def statistics(self) -> dict[str, Any]:
        """Un-normalisation statistics by data set, those that count."""
        return self.dataset_statistics or self.norm_stats

    def llama_config(self, attn_implementation: str) -> LlamaConfig:
        """Return transformers' configuration of the language model, with its attention kernel chosen."""
        values: dict[str, Any] = {name: getattr(self, name) for name in LLM_FIELDS}
        for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
            values[name] = getattr(self, name)
        values["attn_implementation"] = attn_implementation
        return LlamaConfig(**values)
