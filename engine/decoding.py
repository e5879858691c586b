"""From the bytes of an image file to its pixels."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mixmask.engine.errors import DataError, RunFailure
from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor

# Files that are images by their names: those of torchvision's ImageFolder, and .gif.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
ARRAYS = (".npy",)  # count as images only where there are no others: features often lie beside images

MAX_PIXELS = 178_956_970  # Pillow's limit; a file of a megabyte can claim any size
SMALL_JPEG = 1 << 18  # bytes: a JPEG of this size cannot have more than MAX_PIXELS

NPY = b"\x93NUMPY"
PNG = b"\x89PNG\r\n\x1a\n"
PILLOWS = (b"II*\x00", b"MM\x00*", b"BM", b"P5", b"P6")  # TIFF, BMP and PNM begin so: torchvision does not read them


@dataclass(frozen=True)
class Decoding:
    """What images are decoded to.

    Attributes:
        channels: 3 is RGB; grey images get three equal channels. 1 is grey; colours become luma. Any other number takes
            images that have as many channels: 4 of PNG and TIFF, any number of .npy arrays. 0 is whatever they have.
        levels: Values of 16-bit images that become 0 and 255; by default 0 and 65535.
    """

    channels: int = 3
    levels: tuple[int, int] | None = None


RGB = Decoding()
AS_THEY_ARE = Decoding(channels=0)
MODES = {1: "GRAY", 3: "RGB"}  # torchvision.io.ImageReadMode by the number of channels


def read_whole(path: Path) -> Tensor:
    """(n,) uint8, the bytes of a file.

    Raises:
        DataError: If there is no such file, or it may not be read.
        RunFailure: If the system cannot read it (a disk or a network that fails).
    """
    try:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{path}: not a readable image ({error.strerror})") from None
    except OSError as error:
        raise RunFailure(f"{path}: cannot be read ({error.strerror or error})") from None


def decode(path: Path, how: Decoding = RGB) -> Tensor:
    """Read one image file; see `read_whole` and `decode_bytes`."""
    return decode_bytes(read_whole(path), path, how)


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
    elif head.startswith(PILLOWS) or (head.startswith(PNG) and not is_sound_png(content)):
        # torchvision does not survive a damaged PNG; Pillow says what is wrong with it.
        image = _by_pillow(content, name, how.channels)
    else:
        from torchvision.io import ImageReadMode, decode_image

        try:
            image = decode_image(content, mode=ImageReadMode[MODES.get(how.channels, "UNCHANGED")])
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else "unreadable"
            reason = re.sub(r"^\S+(\(\))?, \S+:\d+, ", "", said)  # without torchvision's function and source file
            raise DataError(f"{name}: not a readable image ({reason if len(content) else 'empty'})") from None
    if image.ndim == 4:  # an animation: keep the first frame
        image = image[0]
    if how.channels == 1 and len(image) == 3:  # WebP and GIF, of which torchvision reads no grey
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        image = rgb_to_grayscale(image)
    if how.channels not in (0, len(image)):
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


# --- headers ---------------------------------------------------------------------------------------------------------


def _refuse_bomb(head: bytes, content: Tensor, name: Path) -> None:
    """Refuse an image whose header claims more pixels than any photograph has, before memory is taken for them."""
    width = height = 0
    if head.startswith(PNG) and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
    elif head.startswith(b"GIF8") and len(head) >= 10:
        width, height = struct.unpack("<HH", head[6:10])
    elif head.startswith(b"\xff\xd8") and len(content) > SMALL_JPEG:
        width, height = _jpeg_size(content)
    elif head.startswith(PILLOWS):
        width, height = header_size(content, name)
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: not a readable image (its header claims {width:,} × {height:,} pixels; at most {MAX_PIXELS:,} are "
            f"read)"
        )


def _jpeg_size(content: Tensor) -> tuple[int, int]:
    """Width and height from the start of frame; zeros if there is none."""
    whole = memoryview(content.numpy().data)
    place = 2
    while place + 9 < len(whole) and whole[place] == 0xFF:
        marker = whole[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", whole[place + 5 : place + 9])
            return width, height
        # Fill bytes and markers without a length are one and two bytes long.
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD7
        place += 1 if marker == 0xFF else 2 if alone else 2 + struct.unpack(">H", whole[place + 2 : place + 4])[0]
    return 0, 0


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
    except Exception as error:  # Pillow's readers raise many types
        raise _unreadable(name, error) from None


def is_sound_png(content: Tensor) -> bool:
    """Whether a PNG's chunks have their checksums, and its compressed data as many bytes as its header says."""
    whole = memoryview(content.numpy().data)
    place, packed, header = len(PNG), bytearray(), b""
    while True:
        if place + 12 > len(whole):
            return False
        size, kind = struct.unpack(">I4s", whole[place : place + 8])
        end = place + 12 + size
        if end > len(whole) or zlib.crc32(whole[place + 4 : end - 4]) != struct.unpack(">I", whole[end - 4 : end])[0]:
            return False
        if kind == b"IHDR":
            header = bytes(whole[place + 8 : end - 4])
        elif kind == b"IDAT":
            packed += whole[place + 8 : end - 4]
        elif kind == b"IEND":
            break
        place = end
    if len(header) != 13:
        return False
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 0)
    rows = _png_rows(width, height, bits, bool(interlaced))
    expected = sum(count * (1 + length) for count, length in rows)
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(packed, expected + 1)
        raw += inflater.decompress(inflater.unconsumed_tail, 1)  # reaches the checksum at the end
    except zlib.error:
        return False
    if len(raw) != expected or not inflater.eof:
        return False
    start = 0
    for count, length in rows:  # the first byte of every row is the number of its filter
        if any(filter_type > 4 for filter_type in raw[start : start + count * (1 + length) : 1 + length]):
            return False
        start += count * (1 + length)
    return True


def _png_rows(width: int, height: int, bits: int, interlaced: bool) -> list[tuple[int, int]]:
    """Rows and bytes per row of each pass of a PNG."""
    if not interlaced:
        return [(height, -(-width * bits // 8))]
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    return [(high, -(-wide * bits // 8)) for wide, high in sizes if wide > 0 and high > 0]


# --- formats that torchvision does not read --------------------------------------------------------------------------


def _unreadable(name: Path, error: Exception) -> DataError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{name}: not a readable image ({re.sub(r' <_io.BytesIO[^>]*>', '', said)})")


def _by_pillow(content: Tensor, name: Path, channels: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(content.numpy().tobytes())) as image:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
                # Of PGM files with more than 8 bits Pillow makes values up to 65535, whatever their largest is.
                values = np.asarray(image).astype(np.uint16)
            elif image.mode in ("I", "F"):
                raise ValueError(f"values of 32 bits ({image.mode}); 8 or 16 bits, or a .npy array, can be read")
            else:
                values = np.asarray(image.convert({1: "L", 3: "RGB"}.get(channels, image.mode)), dtype=np.uint8)
    except Exception as error:  # Pillow's readers raise many types
        raise _unreadable(name, error) from None
    pixels = torch.from_numpy(values.copy())
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return torch.cat([pixels] * channels) if len(pixels) == 1 and channels == 3 else pixels


def _load(content: Tensor, name: Path) -> Any:
    try:
        found = np.load(io.BytesIO(content.numpy().tobytes()), allow_pickle=False)
    except Exception as error:  # numpy's reader raises many types on a damaged header
        raise DataError(
            f"{name}: not a readable array ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from None
    if found.dtype not in (np.uint8, np.uint16) or found.ndim not in (2, 3) or not found.size:
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
