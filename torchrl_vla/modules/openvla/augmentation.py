"""OpenVLA's image augmentation, batched on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrl_vla.errors import UserError
from torchrl_vla.modules.openvla.image_pipeline import CROP_AREA


@dataclass(frozen=True)
class ImageAugmentation:
    """Random crop, brightness, contrast, saturation and hue, in this order, drawn anew for every image.

    Each colour operation is TensorFlow's (``tf.image.random_*``), on values in [0, 1] that are clipped afterwards. The
    crop is ``tf.image.crop_and_resize``'s, of which evaluation takes the centre; the result stays in float instead of
    being rounded to levels.

    Args:
        crop_area: share of the image's area that a crop keeps; it is scaled back to the image's size. Evaluation cuts
            0.9 out of the centre, so keep it at that.
        brightness: largest shift of all values.
        contrast: largest relative change of the distance to the image's mean, channel by channel.
        saturation: largest relative change of the HSV saturation.
        hue: largest turn of the HSV hue; 1 is the full circle.

    Raises:
        ValueError: if a value is out of range.

    Source: OpenVLA (arXiv:2406.09246), ``image_aug`` of its fine-tuning script (through dlimp's ``augment_image``).

    Examples:
        >>> images = torch.randint(0, 256, (4, 3, 126, 126), dtype=torch.uint8)
        >>> ImageAugmentation()(images).shape
        torch.Size([4, 3, 126, 126])
    """

    crop_area: float = CROP_AREA
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.crop_area <= 1:
            raise UserError(f"crop_area must lie in (0, 1], got {self.crop_area}.")
        for name, most in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{name} must lie in [0, {most:g}] (0 turns it off), got {getattr(self, name)}.")

    def __call__(self, images: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: uint8 [B, 3, S, S].

        Returns:
            float32 [B, 3, S, S], values 0..255.
        """
        with torch.autocast(images.device.type, enabled=False):
            values = images.float() / 255.0
            if self.crop_area < 1:
                values = random_crop(values, self.crop_area)
            if self.brightness:
                values = (values + _uniform(values, self.brightness)).clamp(0.0, 1.0)
            if self.contrast:
                mean = values.mean(dim=(-2, -1), keepdim=True)
                values = ((values - mean) * (1.0 + _uniform(values, self.contrast)) + mean).clamp(0.0, 1.0)
            if self.saturation or self.hue:
                hue, saturation, value = rgb_to_hsv(values).unbind(1)
                saturation = (saturation * (1.0 + _uniform(values, self.saturation)[:, 0])).clamp(0.0, 1.0)
                hue = (hue + _uniform(values, self.hue)[:, 0]) % 1.0
                values = hsv_to_rgb(torch.stack([hue, saturation, value], dim=1))
            return values * 255.0


def _uniform(values: Tensor, width: float) -> Tensor:
    """Return a number in [-width, width] per image, [B, 1, 1, 1]."""
    return torch.empty(len(values), 1, 1, 1, device=values.device).uniform_(-width, width)


def random_crop(values: Tensor, area: float, offsets: Tensor | None = None) -> Tensor:
    """Cut a square out of each image and scale it back, bilinearly with corners on corners.

    Args:
        values: float [B, 3, S, S].
        area: share of the area to keep.
        offsets: where the crops begin, [B, 2] (x, y) from 0 to 1: left or top edge, to right or bottom edge. None draws
            them.
    """
    side = math.sqrt(area)
    if offsets is None:
        offsets = torch.rand(len(values), 2, device=values.device)
    theta = values.new_zeros(len(values), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = (2.0 * offsets - 1.0) * (1.0 - side)
    grid = F.affine_grid(theta, list(values.shape), align_corners=True)
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=True)


def rgb_to_hsv(values: Tensor) -> Tensor:
    """Colours in [0, 1], [B, 3, H, W], to hue, saturation and value, each in [0, 1]; grey has hue 0."""
    red, green, blue = values.unbind(1)
    value, channel = values.max(dim=1)
    chroma = value - values.amin(dim=1)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sectors = torch.stack(
        [(green - blue) / divisor % 6.0, (blue - red) / divisor + 2.0, (red - green) / divisor + 4.0], 1
    )
    hue = sectors.gather(1, channel.unsqueeze(1)).squeeze(1) / 6.0
    saturation = torch.where(value > 0, chroma / value.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    return torch.stack([torch.where(chroma > 0, hue, 0.0), saturation, value], dim=1)


def hsv_to_rgb(values: Tensor) -> Tensor:
    """Return the inverse of :func:`rgb_to_hsv`."""
    hue, saturation, value = values.unbind(1)
    # Smith's hexcone without branches: how far each channel falls below the value, by its distance in hue.
    shifts = torch.tensor([5.0, 3.0, 1.0], device=values.device).view(1, 3, 1, 1)
    k = (shifts + 6.0 * hue.unsqueeze(1)) % 6.0
    fall = torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)
    return value.unsqueeze(1) * (1.0 - saturation.unsqueeze(1) * fall)
