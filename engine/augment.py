"""Random crops, and the photometric augmentation that runs batched on the device with per-sample draws.

Images are float in [0, 1] here. Each operation does to one sample what torchvision's function of the same name does to
one image (``torchvision.transforms.v2.functional`` on float tensors); only the loop over samples is gone.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from engine.config import Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class CropRecipe(Recipe):
    """A random resized crop and a flip: the defaults of supervised training at 224 pixels."""

    crop: int = Field(224, ge=8)
    scale: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _crop_ranges(self) -> CropRecipe:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got {list(self.scale)}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect must satisfy 0 < low <= high, got {list(self.aspect)}")
        return self


class AugmentRecipe(CropRecipe):
    """One random view: crop and flip (on uint8), then jitter, greyscale and blur (on the device).

    Defaults are MoCo v2's "aug+" (arXiv:2003.04297, section 2) at 224 pixels.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.4, ge=0)
    hue: float = Field(0.1, ge=0, le=0.5)
    jitter_probability: float = Field(0.8, ge=0, le=1)
    grayscale_probability: float = Field(0.2, ge=0, le=1)
    blur_probability: float = Field(0.5, ge=0, le=1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    @model_validator(mode="after")
    def _blur_range(self) -> AugmentRecipe:
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must satisfy 0 < low <= high, got {list(self.blur_sigma)}")
        return self


# --- crops -----------------------------------------------------------------------------------------------------------


def draw_crops(
    sizes: Tensor, scale: tuple[float, float], aspect: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Random resized crops (torchvision's RandomResizedCrop) for many images at once.

    Up to ten attempts per image: area uniform in ``scale`` times the image's, aspect log-uniform; else the centre.

    Args:
        sizes: (N, 2) height and width of each image.
        scale: Range of the area, as a share of the image's.
        aspect: Range of width over height.
        generator: Where the draws come from.

    Returns:
        (N, 4) int64: top, left, height, width.
    """
    num = len(sizes)
    height, width = sizes[:, 0:1].double(), sizes[:, 1:2].double()
    draws = torch.rand(4, num, 10, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = torch.exp(low + (high - low) * draws[1])
    w = torch.sqrt(area * ratio).round()
    h = torch.sqrt(area / ratio).round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.int64).argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first), h.gather(1, first)
    top = (draws[2].gather(1, first) * (height - h + 1)).floor()
    left = (draws[3].gather(1, first) * (width - w + 1)).floor()
    none = ~fits.any(dim=1, keepdim=True)
    if none.any():
        wide, tall = width / height > aspect[1], width / height < aspect[0]
        fallback_w = torch.where(wide, (height * aspect[1]).round(), width)
        fallback_h = torch.where(tall, (width / aspect[0]).round(), height)
        w, h = torch.where(none, fallback_w, w), torch.where(none, fallback_h, h)
        top = torch.where(none, ((height - h) / 2).floor(), top)
        left = torch.where(none, ((width - w) / 2).floor(), left)
    return torch.cat([top, left, h, w], dim=1).to(torch.int64)


def draw_crop(height: int, width: int, recipe: CropRecipe, draws: random.Random) -> tuple[int, int, int, int, bool]:
    """As `draw_crops`, for one image and in plain Python: what a loader's worker can afford for every picture.

    Returns:
        Top, left, height and width of the crop in pixels, and whether it is flipped.
    """
    flip = draws.random() < recipe.flip
    low, high = math.log(recipe.aspect[0]), math.log(recipe.aspect[1])
    for _ in range(10):
        area = height * width * draws.uniform(*recipe.scale)
        ratio = math.exp(draws.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draws.randrange(height - h + 1), draws.randrange(width - w + 1), h, w, flip
    h, w = height, width
    if width / height > recipe.aspect[1]:
        w = round(height * recipe.aspect[1])
    elif width / height < recipe.aspect[0]:
        h = round(width / recipe.aspect[0])
    return (height - h) // 2, (width - w) // 2, h, w, flip


def crop_and_flip(images: Tensor, crops: Tensor, flips: Tensor, size: int) -> Tensor:
    """Cut, resize (bilinear) and flip a batch of images of one size, each with its own crop.

    Equal to cropping and then resizing each image, without anti-aliasing: meant for crops no larger than ``size``.

    Args:
        images: (N, 3, H, W) uint8.
        crops: (N, 4) top, left, height, width.
        flips: (N,) bool.
        size: Side of the result in pixels.

    Returns:
        (N, 3, size, size) float in [0, 1].
    """
    num, _, height, width = images.shape
    crops = crops.to(images.device, torch.float32)
    centre = torch.arange(size, device=images.device, dtype=torch.float32) + 0.5

    def positions(start: Tensor, length: Tensor, mirrored: Tensor | None) -> Tensor:
        place = centre.expand(num, size)
        if mirrored is not None:
            place = torch.where(mirrored[:, None], size - place, place)
        inside = place * (length / size)[:, None] - 0.5
        return start[:, None] + torch.minimum(inside.clamp(min=0), length[:, None] - 1)

    y = positions(crops[:, 0], crops[:, 2], None)
    x = positions(crops[:, 1], crops[:, 3], flips.to(images.device))
    grid_y = ((2 * y + 1) / height - 1)[:, :, None].expand(num, size, size)
    grid_x = ((2 * x + 1) / width - 1)[:, None, :].expand(num, size, size)
    grid = torch.stack([grid_x, grid_y], dim=-1)
    return F.grid_sample(images.float() / 255, grid, mode="bilinear", padding_mode="border", align_corners=False)


# --- photometric operations ------------------------------------------------------------------------------------------


def _factor(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device, images.dtype).view(-1, 1, 1, 1)


def grayscale(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma: (N, 3, H, W) to (N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Scale towards black; ``factors`` (N,)."""
    return (images * _factor(factors, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean grey value of each image; ``factors`` (N,)."""
    factor = _factor(factors, images)
    mean = grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    return (factor * images + (1 - factor) * mean).clamp_(0, 1)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image; ``factors`` (N,)."""
    factor = _factor(factors, images)
    return (factor * images + (1 - factor) * grayscale(images)).clamp_(0, 1)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue; ``shifts`` (N,) in [-0.5, 0.5], as shares of the colour circle.

    RGB to HSV and back collapses to one formula per channel: with V the largest channel and C the spread, a channel
    is V - C * clamp(min(k, 4 - k), 0, 1) where k = (offset + 6 * hue) mod 6; the offset is 5, 3, 1 for red, green, blue.
    """
    red, green, blue = images.unbind(1)
    value, _ = images.max(dim=1)
    spread = value - images.min(dim=1).values
    safe = torch.where(spread == 0, torch.ones_like(spread), spread)
    is_red = value == red
    is_green = (value == green) & ~is_red
    hue6 = torch.where(
        is_red,
        (green - blue) / safe,
        torch.where(is_green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue6 = hue6 + 6 * _factor(shifts, images).squeeze(1)
    channels = []
    for offset in (5, 3, 1):
        k = (offset + hue6).remainder(6)
        channels.append(value - spread * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(images: Tensor, sigmas: Tensor, radius: int) -> Tensor:
    """Blur each image with its own Gaussian, reflecting at the border.

    Args:
        images: (N, 3, H, W).
        sigmas: (N,) standard deviations in pixels, above 0.
        radius: Half the kernel size in pixels: the kernel has ``2 * radius + 1`` taps. Below H and W.
    """
    num, channels, height, width = images.shape
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (offsets / sigmas.to(images.device, torch.float32)[:, None]) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).to(images.dtype)  # (N, taps)
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    rows = torch.zeros(num, channels, height, width + 2 * radius, device=images.device, dtype=images.dtype)
    for tap in range(2 * radius + 1):
        rows.addcmul_(padded[:, :, tap : tap + height], kernels[:, tap].view(-1, 1, 1, 1))
    result = torch.zeros_like(images)
    for tap in range(2 * radius + 1):
        result.addcmul_(rows[..., tap : tap + width], kernels[:, tap].view(-1, 1, 1, 1))
    return result


@dataclass(frozen=True)
class PhotometricDraws:
    """What was drawn for a batch, each (N,); ``order`` (N, 4) permutes brightness, contrast, saturation and hue."""

    jitter: Tensor
    order: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor

    def rows(self, chosen: slice) -> PhotometricDraws:
        """The draws of some of the samples."""
        return PhotometricDraws(*(getattr(self, field.name)[chosen] for field in fields(self)))


def draw_photometric(recipe: AugmentRecipe, num: int, generator: torch.Generator) -> PhotometricDraws:
    """Draw the parameters of one batch, each sample on its own."""
    uniform = torch.rand(8, num, generator=generator)

    def factor(row: int, strength: float) -> Tensor:
        low = max(0.0, 1 - strength)
        return low + (1 + strength - low) * uniform[row]

    sigma_low, sigma_high = recipe.blur_sigma
    return PhotometricDraws(
        jitter=uniform[0] < recipe.jitter_probability,
        order=torch.rand(num, 4, generator=generator).argsort(dim=1),
        brightness=factor(1, recipe.brightness),
        contrast=factor(2, recipe.contrast),
        saturation=factor(3, recipe.saturation),
        hue=recipe.hue * (2 * uniform[4] - 1),
        grayscale=uniform[5] < recipe.grayscale_probability,
        blur=uniform[6] < recipe.blur_probability,
        sigma=sigma_low + (sigma_high - sigma_low) * uniform[7],
    )


def apply_photometric(images: Tensor, draws: PhotometricDraws, blur_radius: int) -> Tensor:
    """Jitter, greyscale and blur a batch of (N, 3, H, W) images in [0, 1]; the input is not changed."""
    images = images.clone()
    operations = (
        (adjust_brightness, draws.brightness),
        (adjust_contrast, draws.contrast),
        (adjust_saturation, draws.saturation),
        (adjust_hue, draws.hue),
    )
    for position in range(4):
        for number, (operation, values) in enumerate(operations):
            chosen = (draws.jitter & (draws.order[:, position] == number)).nonzero().flatten()
            if len(chosen):
                there = chosen.to(images.device)
                images[there] = operation(images[there], values[chosen])
    grey = draws.grayscale.nonzero().flatten().to(images.device)
    if len(grey):
        images[grey] = grayscale(images[grey]).expand(-1, 3, -1, -1)
    blur = draws.blur.nonzero().flatten()
    if len(blur):
        there = blur.to(images.device)
        images[there] = gaussian_blur(images[there], draws.sigma[blur], blur_radius)
    return images


class Photometric:
    """The photometric half of an `AugmentRecipe`, ready to be applied to batches."""

    def __init__(self, recipe: AugmentRecipe) -> None:
        self.recipe = recipe

    def __call__(self, images: Tensor, generator: torch.Generator, rows: slice, total: int) -> Tensor:
        """Augment and normalise some rows of a batch.

        Args:
            images: (N, 3, H, W) float in [0, 1], the rows ``rows``.
            generator: Draws for the whole batch, so that a sample's draws do not depend on which process has it.
            rows: Which rows of the batch these are.
            total: Rows of the whole batch.

        Returns:
            (N, 3, H, W), channels last in memory.
        """
        draws = draw_photometric(self.recipe, total, generator).rows(rows)
        # Four standard deviations hold 99.99 % of a Gaussian; a kernel may not be wider than the image.
        radius = min(math.ceil(4 * self.recipe.blur_sigma[1]), min(images.shape[-2:]) - 1)
        augmented = normalize(apply_photometric(images, draws, radius))
        return augmented.contiguous(memory_format=torch.channels_last)


def normalize(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation, per channel."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images - mean) / std
