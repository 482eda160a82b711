"""JPEG as TensorFlow codes and decodes it, without TensorFlow and without Python's lock."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

try:
    import cv2
except ImportError:  # it comes with robosuite, but needs libGL, which a server without LIBERO may not have
    cv2 = None  # type: ignore[assignment]

__all__ = ["decode_jpeg", "encode_jpeg", "jpeg_round_trip"]

_QUALITY = 95
_THREADS = min(8, len(os.sched_getaffinity(0)))


def encode_jpeg(frame: np.ndarray) -> bytes:
    """Return a frame as JPEG at quality 95 with 4:2:0 chroma, the bytes that ``tf.io.encode_jpeg`` writes.

    OpenCV and Pillow write the same bytes; OpenCV lets other Python threads run meanwhile, and is taken where it loads.

    Args:
        frame: uint8 ``[H, W, 3]``, RGB.
    """
    if cv2 is None:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=_QUALITY, subsampling="4:2:0")
        return buffer.getvalue()
    quality = (cv2.IMWRITE_JPEG_QUALITY, _QUALITY)
    chroma = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420)
    reversed_channels = np.empty(frame.shape, np.uint8)
    # Not cvtColor, whose threads would not survive a fork.
    cv2.mixChannels([np.ascontiguousarray(frame)], [reversed_channels], [0, 2, 1, 1, 2, 0])
    return cv2.imencode(".jpg", reversed_channels, quality + chroma)[1].tobytes()


def decode_jpeg(data: bytes | memoryview | np.ndarray) -> np.ndarray:
    """Return the frame of a JPEG, uint8 ``[H, W, 3]``, RGB, pixel by pixel that of ``tf.io.decode_image``."""
    # simplejpeg's decoder has TensorFlow's fast DCT and upsampling; its coder has another rounding than TensorFlow's.
    return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=False)


def jpeg_round_trip(images: Tensor) -> Tensor:
    """JPEG and back, uint8 ``[N, 3, H, W]``, on the CPU, several frames at a time."""
    frames = images.permute(0, 2, 3, 1).cpu().contiguous().numpy()
    decoded = np.empty_like(frames)
    # Made anew each time, in a fraction of a millisecond: a pool that is kept would not survive a fork.
    with ThreadPoolExecutor(_THREADS) as pool:
        for index, frame in enumerate(pool.map(_round_trip, frames)):
            decoded[index] = frame
    return torch.from_numpy(decoded).permute(0, 3, 1, 2)


def _round_trip(frame: np.ndarray) -> np.ndarray:
    return decode_jpeg(encode_jpeg(frame))
