"""Demonstrations as batches of network inputs and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import SamplerWithoutReplacement, TensorDictReplayBuffer, TensorStorage

from torchrl_vla.datasets import DemonstrationMixture
from torchrl_vla.errors import UserError
from torchrl_vla.modules import OpenVLAProcessor
from torchrl_vla.modules.backbone import IMAGE_KEYS
from torchrl_vla.modules.openvla.augmentation import ImageAugmentation
from torchrl_vla.modules.openvla.image_pipeline import center_crop_resize, normalize
from torchrl_vla.modules.openvla.model import OpenVLA

__all__ = ["InputBuilder", "load_samples", "sample_buffer"]

# Samples stay on the GPU where they leave most of its memory to the network.
_LARGEST_SHARE = 0.25


def load_samples(
    data: DemonstrationMixture, episodes: Mapping[str, Sequence[str]], model: OpenVLA, processor: OpenVLAProcessor
) -> TensorDict:
    """Return samples of some episodes at the network's image size, on its device if they fit there easily.

    Args:
        data: the demonstrations.
        episodes: names of the episodes, by suite.
        model: the network.
        processor: of the network.
    """
    config = model.config
    keys = [key[1] for key in IMAGE_KEYS[: config.num_images]]
    storage = model.device
    if storage.type == "cuda":
        frames = sum(
            len(data.datasets[suite].episodes[name]["action"]) for suite, names in episodes.items() for name in names
        )
        needed = frames * len(keys) * 3 * config.image_size**2
        if needed > _LARGEST_SHARE * torch.cuda.mem_get_info(storage)[0]:
            storage = torch.device("cpu")
    return data.samples(
        episodes,
        n_bins=processor.action_tokenizer.n_bins,
        image_size=config.image_size,
        chunk_size=config.chunk_size,
        image_keys=keys,
        device=model.device,
        storage_device=storage,
    )


def sample_buffer(samples: TensorDict, batch_size: int) -> TensorDictReplayBuffer:
    """Return a buffer that gives every sample once per pass, in random order.

    Raises:
        ValueError: there are fewer samples than a batch has.
    """
    if len(samples) < batch_size:
        raise UserError(
            f"mini_batch_size is {batch_size}, but the demonstrations have {len(samples)} samples: lower "
            "mini_batch_size, or take more episodes."
        )
    sampler = SamplerWithoutReplacement(drop_last=True)
    return TensorDictReplayBuffer(storage=TensorStorage(samples), sampler=sampler, batch_size=batch_size)


class InputBuilder:
    """Turns samples into what the network reads and what the losses compare with, on the network's device.

    Args:
        model: the network.
        processor: tokenizes instructions.
        instructions: those that the samples count in.

    Keyword Args:
        augmentation: of training images; held-out ones get evaluation's centre crop.
        proprio_noise: standard deviation of noise on the normalised states in training.
    """

    def __init__(
        self,
        model: OpenVLA,
        processor: OpenVLAProcessor,
        instructions: Sequence[str],
        *,
        augmentation: ImageAugmentation,
        proprio_noise: float,
    ) -> None:
        self.device = model.device
        self.augmentation = augmentation
        self.proprio_noise = proprio_noise
        self.image_keys = IMAGE_KEYS[: model.config.num_images]
        self.use_proprio = model.config.use_proprio
        # All prompts at once: every batch has the same shapes, so that a compiled network is compiled once.
        ids, mask = processor.encode_instructions(list(instructions))
        self._prompts = ids.to(self.device)
        self._prompt_mask = None if mask is None else mask.to(self.device)

    @property
    def in_keys(self) -> list[str]:
        """Arguments of the network that are given."""
        keys = ["pixel_values", "input_ids"]
        return keys + ["attention_mask"] * (self._prompt_mask is not None) + ["proprio"] * self.use_proprio

    def __call__(self, samples: TensorDictBase, *, training: bool) -> TensorDict:
        """Build a batch.

        Args:
            samples: as :meth:`DemonstrationMixture.samples` gives them, [B].
            training: augment images and add noise to states.

        Returns:
            ``in_keys``, ``("vla_action", "tokens")`` int64 and ``("vla_action", "chunk")`` float32 normalised
            [B, K, 7], and ``mask`` [B, K].
        """
        samples = samples.to(self.device, non_blocking=True)
        images = [samples.get(key) for key in self.image_keys]
        images = [self.augmentation(frames) if training else center_crop_resize(frames) for frames in images]
        rows = samples["instruction_id"]
        inputs = {
            "pixel_values": torch.cat([normalize(frames) for frames in images], dim=1),
            "input_ids": self._prompts[rows],
            "vla_action": samples["vla_action"],
            "mask": samples["mask"],
        }
        if self._prompt_mask is not None:
            inputs["attention_mask"] = self._prompt_mask[rows]
        if self.use_proprio:
            inputs["proprio"] = self._state(samples["observation", "state"], training)
        return TensorDict(inputs, samples.batch_size)

    def _state(self, state: Tensor, training: bool) -> Tensor:
        if training and self.proprio_noise:
            return state + self.proprio_noise * torch.randn_like(state)
        return state
