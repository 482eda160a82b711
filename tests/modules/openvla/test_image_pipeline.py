from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from torchrl_vla.modules.openvla import jpeg
from torchrl_vla.modules.openvla.image_pipeline import (
    ImagePipeline,
    center_crop_resize,
    lanczos3_resize,
    normalize,
)
from torchrl_vla.modules.openvla.jpeg import encode_jpeg, jpeg_round_trip

DATA = Path(__file__).parents[2] / "data" / "images"


def _image(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(DATA / f"{name}.png")).copy()).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def upright() -> Tensor:
    return _image("raw").flip(-1, -2)


def test_jpeg_equals_tensorflow(upright: Tensor) -> None:
    assert torch.equal(jpeg_round_trip(upright), _image("jpeg_roundtrip"))
    batch = jpeg_round_trip(torch.cat([upright, upright.flip(-1)]))
    assert torch.equal(batch[:1], _image("jpeg_roundtrip")) and not torch.equal(batch[1:], batch[:1])
    assert jpeg_round_trip(upright[:0]).shape == upright[:0].shape


def test_opencv_and_pillow_write_the_same_jpeg(upright: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = upright[0].permute(1, 2, 0).numpy()
    assert jpeg.cv2 is not None
    with_opencv = encode_jpeg(frame)
    monkeypatch.setattr(jpeg, "cv2", None)
    assert encode_jpeg(frame) == with_opencv
    assert torch.equal(jpeg_round_trip(upright), _image("jpeg_roundtrip"))


def test_resize_equals_tensorflow_within_one_level_in_1e4_of_the_values() -> None:
    difference = (lanczos3_resize(_image("jpeg_roundtrip"), 224).int() - _image("resized_224").int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-4


def test_crop_equals_tensorflow() -> None:
    assert torch.equal(center_crop_resize(_image("resized_224")), _image("center_cropped_224"))


def test_normalization_equals_upstream_processor() -> None:
    data = np.load(DATA / "normalize.npz")
    values = normalize(torch.from_numpy(data["image"]).permute(2, 0, 1)[None])
    assert torch.equal(values[0, :, ::2, ::2], torch.from_numpy(data["pixel_values_every2"]))
    # White by hand: DINOv2's mean and deviation of red are 0.485 and 0.229, rounded to bfloat16.
    white = normalize(torch.full((1, 3, 1, 1), 255))[0, :, 0, 0]
    assert white[0] == 0.515625 / 0.228515625 and white[3:].tolist() == [1.0, 1.0, 1.0]


def test_exact_is_the_stages_in_order(upright: Tensor) -> None:
    pixels = ImagePipeline(224)(upright)
    assert pixels.shape == (1, 6, 224, 224) and pixels.dtype == torch.float32
    difference = (pixels - normalize(_image("center_cropped_224")))[:, 3:] * 127.5
    # The resize may be off by a level in 1e-4 of the values, each of which the crop spreads over up to 4.
    assert (difference.abs() > 0.5).float().mean() < 4e-4 and difference.abs().max() < 1.5
    uncropped = ImagePipeline(224, center_crop=False)(upright)
    assert ((uncropped - normalize(_image("resized_224"))).abs() > 1e-6).float().mean() < 1e-4


@pytest.mark.parametrize("size", [224, 126])
def test_fast_deviates_from_exact_as_stated(upright: Tensor, size: int) -> None:
    exact, fast = (ImagePipeline(size, backend=backend)(upright)[:, 3:] * 127.5 for backend in ("exact", "fast"))
    difference = (exact - fast).abs()
    assert difference.mean() < 2.0 and difference.quantile(0.99) < 12.0
    # Without the JPEG on either side only the roundings are left: geometry and filter are the same.
    rounded = normalize(center_crop_resize(lanczos3_resize(upright, size)))[:, 3:] * 127.5
    assert (rounded - fast).abs().mean() < 0.5
    # A crop that is one pixel off is told apart.
    shifted = ImagePipeline(size, backend="fast")(upright.roll(1, -1))[:, 3:] * 127.5
    assert (rounded - shifted).abs().mean() > 1.0


def test_a_frame_of_the_models_size_is_not_resized() -> None:
    frame = _image("resized_224")
    assert torch.equal(ImagePipeline(224, center_crop=False, backend="fast")(frame), normalize(frame))
    assert lanczos3_resize(frame, 224) is frame


@pytest.mark.parametrize("backend", ["exact", "fast"])
def test_batches_and_frames_that_are_not_square(upright: Tensor, backend: str) -> None:
    frames = torch.cat([upright, 255 - upright])[..., :200, :]
    pipeline = ImagePipeline(56, backend=backend)
    together = pipeline(frames)
    assert together.shape == (2, 6, 56, 56)
    torch.testing.assert_close(together, torch.cat([pipeline(frames[:1]), pipeline(frames[1:])]), atol=1e-5, rtol=0)
    # Rows and columns are not mixed up: transposed in, transposed out (JPEG's blocks aside).
    if backend == "fast":
        torch.testing.assert_close(pipeline(frames.mT), together.mT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["exact", "fast"])
def test_constant_frames_stay_constant(backend: str) -> None:
    frames = torch.full((1, 3, 256, 256), 128, dtype=torch.uint8)
    pixels = ImagePipeline(126, backend=backend)(frames)
    torch.testing.assert_close(pixels, normalize(torch.full((1, 3, 126, 126), 128)), atol=1e-5, rtol=0)


def test_autocast_does_not_coarsen_the_values(upright: Tensor) -> None:
    for backend in ("exact", "fast"):
        pipeline = ImagePipeline(126, backend=backend)
        expected = pipeline(upright)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(pipeline(upright), expected)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one of exact, fast, got 'quick'"):
        ImagePipeline(backend="quick")
    with pytest.raises(ValueError, match="image_size must be at least 2 pixels, got 0"):
        ImagePipeline(0)
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, 3).byte()):
        with pytest.raises(ValueError, match=r"images must be uint8 \[N, 3, H, W\], got"):
            ImagePipeline(8)(images)
