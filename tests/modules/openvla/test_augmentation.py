"""Augmentation: colours against the standard library's, crops against evaluation's centre crop."""

from __future__ import annotations

import colorsys

import pytest
import torch

from torchrl_vla.modules.openvla.augmentation import ImageAugmentation, hsv_to_rgb, random_crop, rgb_to_hsv
from torchrl_vla.modules.openvla.image_pipeline import center_crop_resize

OFF = dict(crop_area=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 7, 7, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=(42, 42), mode="bilinear") * 255).to(torch.uint8)


def test_hsv_is_colorsys():
    levels = torch.linspace(0, 1, 6)
    colours = torch.cartesian_prod(levels, levels, levels)
    pixels = colours.T.reshape(1, 3, 6, 36)
    hsv = rgb_to_hsv(pixels)
    expected = torch.tensor([colorsys.rgb_to_hsv(*colour) for colour in colours.tolist()]).T.reshape(1, 3, 6, 36)
    # Hue 0 and 1 are the same red.
    torch.testing.assert_close((hsv - expected + 0.5) % 1.0 - 0.5, torch.zeros_like(hsv), atol=1e-6, rtol=0)
    back = torch.tensor([colorsys.hsv_to_rgb(*colour) for colour in colours.tolist()]).T.reshape(1, 3, 6, 36)
    torch.testing.assert_close(hsv_to_rgb(pixels), back, atol=1e-6, rtol=0)


def test_the_centred_crop_is_evaluations(images: torch.Tensor):
    centred = random_crop(images / 255.0, 0.9, torch.full((6, 2), 0.5)) * 255.0
    # Evaluation truncates x * 255.5 to levels.
    assert (centred - center_crop_resize(images).float()).abs().max() <= 1.0


def test_a_crop_begins_where_its_offset_says():
    ramp = torch.arange(11.0).expand(2, 3, 11, 11)  # the value is the column
    cropped = random_crop(ramp, 0.25, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(cropped[0, 0, 0], torch.linspace(0, 5, 11))
    torch.testing.assert_close(cropped[1, 0, 0], torch.linspace(5, 10, 11))


def test_turned_off_it_changes_nothing(images: torch.Tensor):
    torch.testing.assert_close(ImageAugmentation(**OFF)(images), images.float())


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_each_operation_stays_within_its_width(images: torch.Tensor, operation: str):
    torch.manual_seed(0)
    images = (images // 2 + 64).repeat(20, 1, 1, 1)  # nothing is clipped
    width = 0.04 if operation == "hue" else 0.2
    before, after = images / 255.0, ImageAugmentation(**{**OFF, operation: width})(images) / 255.0
    if operation == "brightness":
        change = (after - before).flatten(1)
    elif operation == "contrast":
        spread = [x.std(dim=(-2, -1)) for x in (after, before)]
        torch.testing.assert_close(after.mean(dim=(-2, -1)), before.mean(dim=(-2, -1)), atol=1e-4, rtol=0)
        change = spread[0] / spread[1] - 1.0
    else:
        channel = 0 if operation == "hue" else 1
        a, b = (rgb_to_hsv(x)[:, channel].flatten(1) for x in (after, before))
        change = (a - b + 0.5) % 1.0 - 0.5 if operation == "hue" else torch.where(b > 0.1, a / b - 1.0, torch.nan)
    per_image = change.nanmean(dim=1)
    assert (change - per_image[:, None]).abs().nan_to_num().max() < 0.01  # one draw per image
    assert per_image.abs().max() <= width + 1e-3
    assert per_image.max() > 0.8 * width and per_image.min() < -0.8 * width


def test_images_are_drawn_for_separately_and_by_the_seed(images: torch.Tensor):
    same = images[:1].repeat(4, 1, 1, 1)
    torch.manual_seed(3)
    first = ImageAugmentation()(same)
    assert all(not torch.equal(first[i], first[j]) for i in range(4) for j in range(i))
    torch.manual_seed(3)
    assert torch.equal(first, ImageAugmentation()(same))
    assert first.min() >= 0 and first.max() <= 255.0001


@pytest.mark.parametrize(("name", "value"), [("crop_area", 0.0), ("hue", 0.6), ("contrast", -0.1), ("brightness", 2.0)])
def test_bad_widths_are_named(name: str, value: float):
    with pytest.raises(ValueError, match=name):
        ImageAugmentation(**{name: value})
