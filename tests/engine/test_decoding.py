"""From bytes to pixels: channels, 16 bits, other formats, and images that are none."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mixmask.engine.array_images import ArrayImages
from mixmask.engine.augment import AugmentRecipe, Photometric, adjust_contrast
from mixmask.engine.data import open_split
from mixmask.engine.decoding import MAX_PIXELS, Decoding, _png_rows, decode, decode_bytes, header_size, is_sound_png
from mixmask.engine.errors import DataError
from mixmask.engine.normalization import STATISTICS, Statistics, normalize, statistics_of
from tests.engine.containers import recipe


def encoded(image: Image.Image, kind: str, **keys: object) -> torch.Tensor:
    buffer = io.BytesIO()
    image.save(buffer, kind, **keys)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
NAME = Path("x")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "WEBP"])
def test_lossless_formats_give_the_pixels_that_were_written(kind: str) -> None:
    content = encoded(Image.fromarray(COLOURS), kind, **({"lossless": True} if kind == "WEBP" else {}))
    pixels = decode_bytes(content, NAME)
    assert torch.equal(pixels, torch.from_numpy(COLOURS).permute(2, 0, 1))
    assert header_size(content, NAME) == (9, 6)
    grey = decode_bytes(content, NAME, Decoding(channels=1))
    luma = COLOURS.astype(float) @ np.array([0.299, 0.587, 0.114])
    assert grey.shape == (1, 6, 9)
    assert np.abs(grey[0].numpy() - luma).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_high_byte_or_the_levels_that_are_asked_for(kind: str) -> None:
    values = np.array([[0, 255, 256, 1000], [2000, 4095, 40000, 65535]], dtype=np.uint16)
    content = encoded(Image.fromarray(values), kind)
    for channels in (1, 3):
        pixels = decode_bytes(content, NAME, Decoding(channels=channels))
        assert pixels.shape == (channels, 2, 4)
        assert all(np.array_equal(channel.numpy(), values >> 8) for channel in pixels)
    levels = decode_bytes(content, NAME, Decoding(channels=1, levels=(255, 4095)))
    expected = np.clip(np.round((values.astype(float) - 255) * 255 / (4095 - 255)), 0, 255)
    assert np.array_equal(levels[0].numpy(), expected)


def test_levels_are_a_key_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 2000, dtype=np.uint16)).save(tmp_path / "train" / "a" / "0.png")
    assert int(open_split(recipe(tmp_path), "train").read(0)[0, 0, 0]) == 2000 >> 8
    assert int(open_split(recipe(tmp_path, levels=[0, 4000]), "train").read(0)[0, 0, 0]) == 128
    with pytest.raises(ValueError, match="levels must satisfy 0 <= low < high <= 65535"):
        recipe(tmp_path, levels=[5, 5])


@settings(max_examples=30, deadline=None)
@given(channels=st.integers(1, 13), wide=st.booleans(), first=st.booleans(), height=st.integers(14, 20))
def test_arrays_of_any_number_of_channels(channels: int, wide: bool, first: bool, height: int) -> None:
    kind = np.uint16 if wide else np.uint8
    values = np.random.default_rng(0).integers(0, 65536 if wide else 256, (channels, height, 15), dtype=kind)
    buffer = io.BytesIO()
    np.save(buffer, values if first else values.transpose(1, 2, 0))
    content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    pixels = decode_bytes(content, NAME, Decoding(channels=channels))
    assert np.array_equal(pixels.numpy(), values >> 8 if wide else values)
    if channels not in (1, 3):
        with pytest.raises(
            DataError, match=rf"x: has {channels} channels, and the network takes 3 \(backbone.in_channels\)"
        ):
            decode_bytes(content, NAME)


def test_four_channels_of_a_png_are_read_if_asked_for() -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    content = encoded(Image.fromarray(values, "RGBA"), "PNG")
    four = decode_bytes(content, NAME, Decoding(channels=4))
    assert np.array_equal(four.permute(1, 2, 0).numpy(), values)
    assert decode_bytes(content, NAME).shape == (3, 5, 7)
    with pytest.raises(DataError, match="has 3 channels, and the network takes 4"):
        decode_bytes(encoded(Image.fromarray(COLOURS), "PNG"), NAME, Decoding(channels=4))


def _png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"this is no image", "not a readable image"),
        (_png_that_claims(100_000, 100_000), rf"claims 100,000 × 100,000 pixels; at most {MAX_PIXELS:,} are read"),
        (b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(20), "claims 60,000 × 60,000 pixels"),
        (b"BM" + bytes(60), "not a readable image"),
        (b"II*\x00" + bytes(60), "not a readable image"),
        (b"P6 9999999 9999999 255 ", "not a readable image"),
        (b"\x93NUMPY" + bytes(60), "not a readable array"),
    ],
)
def test_what_is_no_image_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        decode(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"])
def test_whole_pngs_are_sound(mode: str) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (3, 5), (17, 9), (64, 33)):
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
        else:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        content = encoded(image, "PNG")
        assert is_sound_png(content), (mode, height, width)
        assert decode_bytes(content, NAME).shape == (3, height, width)
    assert not is_sound_png(content[:-1])
    assert not is_sound_png(torch.cat([content[:40], content[41:]]))


def test_an_interlaced_png_is_sound() -> None:
    """Pillow writes none: this one was put together by hand, of seven passes of 5 × 3 grey pixels."""
    rows = _png_rows(5, 3, 8, interlaced=True)
    assert sum(length * count for count, length in rows) == 15
    raw = b"".join(bytes([0]) + bytes(range(length)) for count, length in rows for _ in range(count))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 3, 8, 0, 0, 0, 1))
    whole = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    content = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
    assert is_sound_png(content)
    assert decode_bytes(content, NAME).shape == (3, 3, 5)


def test_a_png_with_any_wrong_byte_is_an_image_or_an_error() -> None:
    """torchvision's decoder ends the process at some of them."""
    content, refused = encoded(Image.fromarray(COLOURS), "PNG"), 0
    for place in range(len(content)):
        damaged = content.clone()
        damaged[place] ^= 1 << (place % 8)
        if place < 8:
            continue  # then it is no PNG
        try:
            found = decode_bytes(damaged, NAME)
        except DataError:
            refused += 1
            continue
        assert torch.equal(found, decode_bytes(content, NAME))  # behind the pixels
    assert refused > len(content) - 30


def test_a_jpeg_that_claims_too_much_is_refused() -> None:
    content = encoded(Image.new("L", (4000, 4000)), "JPEG").numpy().tobytes()
    place = content.index(b"\xff\xc0") + 5
    huge = content[:place] + struct.pack(">HH", 60_000, 60_000) + content[place + 4 :] + bytes(300_000)
    with pytest.raises(DataError, match="claims 60,000 × 60,000 pixels"):
        decode_bytes(torch.frombuffer(bytearray(huge), dtype=torch.uint8), NAME)


def test_values_of_more_than_16_bits_are_refused_and_pgm_has_16() -> None:
    values = np.full((4, 5), 20000, dtype=np.uint16)
    pgm = b"P5 5 4 65535 " + values.astype(">u2").tobytes()
    content = torch.frombuffer(bytearray(pgm), dtype=torch.uint8)
    assert decode_bytes(content, NAME).unique().tolist() == [20000 >> 8]
    assert decode_bytes(content, NAME, Decoding(levels=(0, 40000))).unique().tolist() == [128]
    for kind in (np.int32, np.float32):
        with pytest.raises(DataError, match="values of 32 bits"):
            decode_bytes(encoded(Image.fromarray(values.astype(kind)), "TIFF"), NAME)


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a readable array"):
        decode(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", np.zeros((4, 4, 3)))
    with pytest.raises(DataError, match=r"an array of float64 and shape \(4, 4, 3\)"):
        decode(tmp_path / "y.npy")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_an_image_or_an_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM"]))
    whole = encoded(Image.fromarray(COLOURS), kind)
    damaged = whole.clone()
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(whole)))]
    try:
        pixels = decode_bytes(damaged.contiguous(), NAME)
    except DataError:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3


# --- other channels than RGB -----------------------------------------------------------------------------------------


def test_arrays_in_memory_become_grey() -> None:
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    images = ArrayImages(tuple(map(Path, "abcde")), torch.zeros(5, dtype=torch.int64), ("x",), Path("."), pixels=pixels)
    assert images.with_decoding(3) is images
    grey = images.with_decoding(1).array()
    luma = (pixels.double() * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert (grey[:, 0].double() - luma).abs().max() <= 1
    with pytest.raises(DataError, match="3 channels, and the network takes 5"):
        images.with_decoding(5)


def test_statistics_per_channel() -> None:
    images = torch.rand(2, 5, 6, 6)
    own = Statistics(mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.5, 0.4, 0.3, 0.2, 0.1))
    found = normalize(images.clone(), own)
    for channel in range(5):
        expected = (images[:, channel] - own.mean[channel]) / own.std[channel]
        assert torch.allclose(found[:, channel], expected, atol=1e-5)
    mean, std = STATISTICS["cifar10"]
    assert statistics_of("cifar10", 1) == ((sum(mean) / 3,), (sum(std) / 3,))
    with pytest.raises(ValueError, match="for 5 channels give your own"):
        statistics_of("imagenet", 5)
    with pytest.raises(ValueError, match="for 5 channels, and the images have 3"):
        statistics_of(own)
    with pytest.raises(ValueError, match="mean has 2 values and std 1"):
        Statistics(mean=(0.1, 0.2), std=(0.3,))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_augmentation_of_other_channels_is_brightness_contrast_and_blur(channels: int) -> None:
    own = Statistics(mean=(0.5,) * channels, std=(0.25,) * channels)
    view = AugmentRecipe(crop=16, hue=0, saturation=0, grayscale_probability=0, normalization=own, jitter_probability=1)
    images = torch.rand(6, channels, 16, 16)
    first = Photometric(view)(images, torch.Generator().manual_seed(0), slice(0, 6), 6)
    assert first.shape == images.shape
    assert bool(torch.isfinite(first).all())
    # Each row by itself is what it is in the batch.
    alone = Photometric(view)(images[2:3], torch.Generator().manual_seed(0), slice(2, 3), 6)
    assert torch.allclose(alone[0], first[2], atol=1e-6)
    factors = torch.tensor([0.5] * 6)
    blended = adjust_contrast(images, factors)
    expected = 0.5 * images + 0.5 * images.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(blended, expected.clamp(0, 1), atol=1e-6)
