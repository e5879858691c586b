"""The photometric augmentation of RGB images as four kernels per batch, for GPUs.

The operators of `mixmask.engine.augment` are their reference and do the same on CPUs. Triton's interpreter
(``TRITON_INTERPRET=1``) runs the kernels on a CPU, for tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixmask.engine.progress import say

BLOCK = 1024  # pixels of one program
NUM_DRAWS = 13
# Rows of the table of draws.
JITTER = tl.constexpr(0)
BRIGHTNESS = tl.constexpr(1)
CONTRAST = tl.constexpr(2)
SATURATION = tl.constexpr(3)
HUE = tl.constexpr(4)
GRAYSCALE = tl.constexpr(5)
BLUR = tl.constexpr(6)
SIGMA = tl.constexpr(7)
SOLARIZE = tl.constexpr(8)
ORDER = tl.constexpr(9)  # the first of four


@triton.jit
def _drawn(draws, what, row, num):
    return tl.load(draws + what * num + row)


@triton.jit
def _luma(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _unit(values):
    return tl.minimum(tl.maximum(values, 0.0), 1.0)


@triton.jit
def _near(hue, place):
    return _unit(tl.abs(tl.abs(hue - place) - 3.0) - 1.0)


@triton.jit
def _rotate_hue(red, green, blue, shift):
    value = tl.maximum(tl.maximum(red, green), blue)
    lowest = tl.minimum(tl.minimum(red, green), blue)
    spread = value - lowest
    hue = tl.where(
        value == red, green - blue, tl.where(value == green, blue - red + 2.0 * spread, red - green + 4.0 * spread)
    )
    hue = hue / tl.maximum(spread, 1e-12) + 6.0 * shift
    hue = hue - 6.0 * tl.floor(hue / 6.0)
    return (
        lowest + _near(hue, 0.0) * spread,
        lowest + _near(hue, 2.0) * spread,
        lowest + _near(hue, 4.0) * spread,
    )


@triton.jit
def _load(images, row, pixel, inside, stride_row, stride_channel, stride_pixel, BYTES: tl.constexpr):
    start = images + row.to(tl.int64) * stride_row + pixel * stride_pixel
    red = tl.load(start, mask=inside, other=0).to(tl.float32)
    green = tl.load(start + stride_channel, mask=inside, other=0).to(tl.float32)
    blue = tl.load(start + 2 * stride_channel, mask=inside, other=0).to(tl.float32)
    if BYTES:
        red, green, blue = red / 255.0, green / 255.0, blue / 255.0
    return red, green, blue


@triton.jit
def _jitter(red, green, blue, draws, row, num, first, last, mean):
    """The jitter's operations at the places ``first`` to ``last`` - 1 of their drawn order."""
    for place in range(first, last):
        operation = _drawn(draws, ORDER + place, row, num)
        if operation == 0:
            factor = _drawn(draws, BRIGHTNESS, row, num)
            red, green, blue = _unit(red * factor), _unit(green * factor), _unit(blue * factor)
        elif operation == 1:
            factor = _drawn(draws, CONTRAST, row, num)
            grey = (1.0 - factor) * mean
            red, green, blue = _unit(red * factor + grey), _unit(green * factor + grey), _unit(blue * factor + grey)
        elif operation == 2:
            factor = _drawn(draws, SATURATION, row, num)
            grey = (1.0 - factor) * _luma(red, green, blue)
            red, green, blue = _unit(red * factor + grey), _unit(green * factor + grey), _unit(blue * factor + grey)
        else:
            red, green, blue = _rotate_hue(red, green, blue, _drawn(draws, HUE, row, num))
    return red, green, blue


@triton.jit
def _store(out, row, pixel, inside, pixels, red, green, blue, inverted, mean0, mean1, mean2, factor0, factor1, factor2):
    """Solarise, normalise, and write with channels last."""
    if inverted:
        red = tl.where(red >= 0.5, 1.0 - red, red)
        green = tl.where(green >= 0.5, 1.0 - green, green)
        blue = tl.where(blue >= 0.5, 1.0 - blue, blue)
    start = out + row.to(tl.int64) * pixels * 3 + pixel * 3
    tl.store(start, (red - mean0) * factor0, mask=inside)
    tl.store(start + 1, (green - mean1) * factor1, mask=inside)
    tl.store(start + 2, (blue - mean2) * factor2, mask=inside)


@triton.jit
def _contrast_place(draws, row, num):
    """The place of the contrast among the jitter's operations."""
    place = 0
    for other in range(4):
        if _drawn(draws, ORDER + other, row, num) == 1:
            place = other
    return place


@triton.jit
def contrast_means(
    images,
    draws,
    means,
    num,
    pixels,
    stride_row,
    stride_channel,
    stride_pixel,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean luma of each image when its contrast's turn has come; a program per image."""
    row = tl.program_id(0)
    if _drawn(draws, JITTER, row, num) > 0:
        place = _contrast_place(draws, row, num)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, pixels, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < pixels
            red, green, blue = _load(images, row, pixel, inside, stride_row, stride_channel, stride_pixel, BYTES)
            red, green, blue = _jitter(red, green, blue, draws, row, num, 0, place, 0.0)
            total += tl.where(inside, _luma(red, green, blue), 0.0)
        tl.store(means + row, tl.sum(total) / pixels)


@triton.jit
def colours(
    images, draws, means, blurred, out, num, pixels, stride_row, stride_channel, stride_pixel,
    mean0, mean1, mean2, factor0, factor1, factor2, BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Jitter and greyscale. Images without blur are finished here; the others go to ``blurred``, channels first."""
    row = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    red, green, blue = _load(images, row, pixel, inside, stride_row, stride_channel, stride_pixel, BYTES)
    if _drawn(draws, JITTER, row, num) > 0:
        red, green, blue = _jitter(red, green, blue, draws, row, num, 0, 4, tl.load(means + row))
    if _drawn(draws, GRAYSCALE, row, num) > 0:
        grey = _luma(red, green, blue)
        red, green, blue = grey, grey, grey
    if _drawn(draws, BLUR, row, num) > 0:
        start = blurred + row.to(tl.int64) * pixels * 3 + pixel
        tl.store(start, red, mask=inside)
        tl.store(start + pixels, green, mask=inside)
        tl.store(start + 2 * pixels, blue, mask=inside)
    else:
        inverted = _drawn(draws, SOLARIZE, row, num) > 0
        _store(
            out, row, pixel, inside, pixels, red, green, blue, inverted, mean0, mean1, mean2, factor0, factor1, factor2
        )


@triton.jit
def _weighted(start, pixels, along, length, other, stride_along, stride_other, inside, sigma, radius):
    """Three channels' sums over the pixels along a side, weighted by a Gaussian and reflected at the border."""
    red = tl.zeros(along.shape, tl.float32)
    green = tl.zeros(along.shape, tl.float32)
    blue = tl.zeros(along.shape, tl.float32)
    whole = 0.0
    for offset in range(-radius, radius + 1):
        distance = offset / sigma
        weight = tl.exp(-0.5 * distance * distance)
        whole += weight
        place = tl.abs(along + offset)
        place = (length - 1) - tl.abs(length - 1 - place)
        source = start + place * stride_along + other * stride_other
        red += weight * tl.load(source, mask=inside, other=0.0)
        green += weight * tl.load(source + pixels, mask=inside, other=0.0)
        blue += weight * tl.load(source + 2 * pixels, mask=inside, other=0.0)
    return red / whole, green / whole, blue / whole


@triton.jit
def _radius(sigma, height, width):
    return tl.minimum(tl.ceil(3.0 * sigma).to(tl.int32), tl.minimum(height, width) - 1)


@triton.jit
def blur_columns(blurred, halfway, draws, num, height, width, BLOCK: tl.constexpr):
    """The vertical pass of the blur, channels first."""
    row = tl.program_id(0)
    if _drawn(draws, BLUR, row, num) > 0:
        pixels = height * width
        pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < pixels
        sigma = _drawn(draws, SIGMA, row, num)
        start = row.to(tl.int64) * pixels * 3
        red, green, blue = _weighted(
            blurred + start, pixels, pixel // width, height, pixel % width, width, 1, inside, sigma,
            _radius(sigma, height, width),
        )  # fmt: skip
        tl.store(halfway + start + pixel, red, mask=inside)
        tl.store(halfway + start + pixels + pixel, green, mask=inside)
        tl.store(halfway + start + 2 * pixels + pixel, blue, mask=inside)


@triton.jit
def blur_rows(
    halfway, out, draws, num, height, width, mean0, mean1, mean2, factor0, factor1, factor2, BLOCK: tl.constexpr
):
    """The horizontal pass of the blur; then the images are solarised and normalised."""
    row = tl.program_id(0)
    if _drawn(draws, BLUR, row, num) > 0:
        pixels = height * width
        pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < pixels
        sigma = _drawn(draws, SIGMA, row, num)
        red, green, blue = _weighted(
            halfway + row.to(tl.int64) * pixels * 3, pixels, pixel % width, width, pixel // width, 1, width, inside,
            sigma, _radius(sigma, height, width),
        )  # fmt: skip
        inverted = _drawn(draws, SOLARIZE, row, num) > 0
        _store(
            out, row, pixel, inside, pixels, red, green, blue, inverted, mean0, mean1, mean2, factor0, factor1, factor2
        )


def run_kernels(images: Tensor, draws: Tensor, mean: list[float], std: list[float], any_blur: bool) -> Tensor:
    """Jitter, greyscale, blur, solarise and normalise RGB images.

    Args:
        images: (N, 3, H, W) uint8, or float32 in [0, 1]; channels first or last in memory.
        draws: (13, N) float32 on the same device: jitter (0 or 1), factors of brightness, contrast and saturation, the
            hue's shift, greyscale, blur (0 or 1), sigma, solarise (0 or 1), and the order of the four jitter operations.
        mean: Of each channel.
        std: Of each channel.
        any_blur: Whether any image may be blurred.

    Returns:
        (N, 3, H, W) float32, channels last in memory.
    """
    if not images.is_contiguous() and not images.is_contiguous(memory_format=torch.channels_last):
        images = images.contiguous()
    num, _, height, width = images.shape
    pixels = height * width
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device, memory_format=torch.channels_last)
    if not num:
        return out
    means = torch.empty(num, dtype=torch.float32, device=images.device)
    size = images.shape if any_blur else (0,)
    blurred, halfway = (torch.empty(size, dtype=torch.float32, device=images.device) for _ in range(2))
    strides = images.stride(0), images.stride(1), images.stride(3)
    normal = [*mean, *(1 / value for value in std)]
    read: dict[str, Any] = {"BYTES": images.dtype == torch.uint8, "BLOCK": BLOCK}
    grid = (num, triton.cdiv(pixels, BLOCK))
    contrast_means[(num,)](images, draws, means, num, pixels, *strides, **read)
    colours[grid](images, draws, means, blurred, out, num, pixels, *strides, *normal, **read)
    if any_blur:
        blur_columns[grid](blurred, halfway, draws, num, height, width, BLOCK=BLOCK)
        blur_rows[grid](halfway, out, draws, num, height, width, *normal, BLOCK=BLOCK)
    return out


photometric = torch.library.custom_op("mixmask::photometric", run_kernels, mutates_args=(), device_types="cuda")


@photometric.register_fake
def _(images: Tensor, draws: Tensor, mean: list[float], std: list[float], any_blur: bool) -> Tensor:
    return torch.empty(images.shape, dtype=torch.float32, device=images.device, memory_format=torch.channels_last)


@cache
def usable(device: torch.device) -> bool:
    """Whether Triton can compile and start the kernels on a GPU; if not, the user is told once what is used instead."""
    try:
        images = torch.zeros(1, 3, 2, 2, device=device)
        run_kernels(images, torch.ones(NUM_DRAWS, 1, device=device), [0.0] * 3, [1.0] * 3, any_blur=True)
    except Exception as error:  # no C compiler, a driver too old, a cache folder that cannot be written
        why = str(error).strip().splitlines() or [type(error).__name__]
        say(f"the augmentation's kernels do not start ({why[0]}); it runs operator by operator, which is slower")
        return False
    return True
