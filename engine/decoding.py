"""From the bytes of an image file to its pixels."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF

from mixmask.engine.errors import DataError

# Files that are images, by their names. torchvision's ImageFolder reads the same, without .gif and .npy.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".npy")

MAX_PIXELS = 1 << 28  # a PNG of some megabytes can claim any size; 16,384 × 16,384 is beyond any photograph
MAX_JPEG = 1 << 24  # bytes: a smaller JPEG has at most some 4 * MAX_JPEG blocks of 64 pixels

NPY = b"\x93NUMPY"
PILLOWS = (b"II*\x00", b"MM\x00*", b"BM", b"P5", b"P6")  # TIFF, BMP and PNM begin so: torchvision does not read them


@dataclass(frozen=True)
class Decoding:
    """What images are decoded to.

    Attributes:
        channels: 3 is RGB; grey images get three equal channels. 1 is grey; colours become luma. Any other number takes
            images that have as many channels: 4 of PNG and TIFF, any number of .npy arrays.
        levels: Values of 16-bit images that become 0 and 255; by default 0 and 65535.
    """

    channels: int = 3
    levels: tuple[int, int] | None = None


RGB = Decoding()
MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def decode(path: Path, how: Decoding = RGB) -> Tensor:
    """Read one image file; see `decode_bytes`.

    Raises:
        DataError: If the file is missing, truncated or not an image. The message names it.
    """
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({error.strerror})") from None
    return decode_bytes(torch.from_numpy(content), path, how)


def decode_bytes(content: Tensor, name: Path, how: Decoding = RGB) -> Tensor:
    """Decode one image.

    Args:
        content: (n,) uint8, the bytes of a JPEG, PNG, WebP, GIF, TIFF, BMP, PNM or .npy file. Palettes, CMYK and 16-bit
            values are converted; of an animation the first frame is kept. A .npy file holds (H, W), (H, W, C) or
            (C, H, W) uint8 or uint16.
        name: For messages.
        how: Channels and levels.

    Returns:
        (channels, H, W) uint8.

    Raises:
        DataError: If it is truncated, not an image, too large, or has another number of channels.
    """
    head = content[:32].numpy().tobytes()
    _refuse_bomb(head, content, name)
    if head.startswith(NPY):
        image = _array(content, name, how.channels)
    elif head.startswith(PILLOWS):
        image = _by_pillow(content, name, how.channels)
    else:
        try:
            image = decode_image(content, mode=MODES.get(how.channels, ImageReadMode.UNCHANGED))
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else "unreadable"
            reason = re.sub(r"^\w+, \S+:\d+, ", "", said)  # without torchvision's function and source file
            raise DataError(f"{name}: not a readable image ({reason if len(content) else 'empty'})") from None
    if image.ndim == 4:  # an animation: keep the first frame
        image = image[0]
    if how.channels == 1 and len(image) == 3:  # WebP and GIF, of which torchvision reads no grey
        image = TF.rgb_to_grayscale(image)
    if len(image) != how.channels:
        raise DataError(
            f"{name}: has {len(image)} channels, and the network takes {how.channels} (backbone.in_channels)"
        )
    return _to_uint8(image, how.levels)


def _to_uint8(image: Tensor, levels: tuple[int, int] | None) -> Tensor:
    if image.dtype != torch.uint16:
        return image
    # int() first, because torch supports few operations on uint16.
    if levels is None:
        return (image.int() >> 8).to(torch.uint8)
    low, high = levels
    return ((image.int() - low) * (255 / (high - low))).round_().clamp_(0, 255).to(torch.uint8)


def _refuse_bomb(head: bytes, content: Tensor, name: Path) -> None:
    """Refuse an image whose header claims more pixels than any photograph has, before memory is taken for them."""
    width = height = 0
    if head.startswith(b"\x89PNG") and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
    elif head.startswith(b"GIF8") and len(head) >= 10:
        width, height = struct.unpack("<HH", head[6:10])
    elif head.startswith(PILLOWS) or (head.startswith(b"\xff\xd8") and len(content) > MAX_JPEG):
        width, height = header_size(content, name)
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: not a readable image (its header claims {width:,} × {height:,} pixels; at most {MAX_PIXELS:,} are "
            f"read)"
        )


def header_size(content: Tensor, name: Path) -> tuple[int, int]:
    """Width and height in pixels from an image's header.

    Raises:
        DataError: If it has none.
    """
    if content[:6].numpy().tobytes() == NPY:
        shape = _load(content, name).shape
        return (shape[1], shape[0]) if len(shape) == 2 or shape[2] < shape[0] else (shape[2], shape[1])
    try:
        with Image.open(io.BytesIO(content.numpy().tobytes())) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, UnidentifiedImageError) as error:
        raise DataError(f"{name}: not a readable image ({str(error).replace('<_io.BytesIO', '<file')})") from None


def _by_pillow(content: Tensor, name: Path, channels: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(content.numpy().tobytes())) as image:
            if image.mode.startswith("I;16"):
                values = np.asarray(image, dtype=np.uint16)
            else:
                values = np.asarray(image.convert({1: "L", 3: "RGB"}.get(channels, image.mode)), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: not a readable image ({error})") from None
    pixels = torch.from_numpy(values.copy())
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return torch.cat([pixels] * channels) if len(pixels) == 1 and channels == 3 else pixels


def _load(content: Tensor, name: Path) -> Any:
    try:
        found = np.load(io.BytesIO(content.numpy().tobytes()), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, MemoryError) as error:
        raise DataError(f"{name}: not a readable array ({str(error).splitlines()[0]})") from None
    if found.dtype not in (np.uint8, np.uint16) or found.ndim not in (2, 3):
        raise DataError(
            f"{name}: an array of {found.dtype} and shape {found.shape}; (H, W), (H, W, C) or (C, H, W) of uint8 or uint16 "
            f"were expected"
        )
    return found


def _array(content: Tensor, name: Path, channels: int) -> Tensor:
    values = _load(content, name)
    if values.ndim == 2:
        values = values[None]
    elif values.shape[2] == channels or (values.shape[0] != channels and values.shape[2] < values.shape[0]):
        values = values.transpose(2, 0, 1)
    pixels = torch.from_numpy(np.ascontiguousarray(values))
    return torch.cat([pixels] * 3) if len(pixels) == 1 and channels == 3 else pixels
