"""The photometric augmentation that runs batched on the device with per-sample draws.

Images are float in [0, 1] here. Each operation does to one sample what torchvision's function of the same name does to
one image (``torchvision.transforms.v2.functional`` on float tensors); only the loop over samples is gone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from mixmask.engine.config import added
from mixmask.engine.crops import CropRecipe
from mixmask.engine.host_values import to_device
from mixmask.engine.late import torch
from mixmask.engine.normalization import Normalization, as_float, normalize, statistics_of

if TYPE_CHECKING:
    from torch import Tensor

MAX_SIGMA = 100.0  # pixels: a wider blur leaves nothing of an image


class AugmentRecipe(CropRecipe):
    """One random view: crop and flip (on uint8), then jitter, greyscale, blur and solarisation (on the device).

    Defaults are MoCo v2's "aug+" (arXiv:2003.04297, section 2) at 224 pixels. ``normalization`` names the data set whose
    mean and standard deviation the images are normalised with, or gives them as ``{mean: [...], std: [...]}``; the
    backbone file keeps it for the transfer protocols.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    brightness: float = Field(0.4, ge=0, le=10)
    contrast: float = Field(0.4, ge=0, le=10)
    saturation: float = Field(0.4, ge=0, le=10)
    hue: float = Field(0.1, ge=0, le=0.5)
    jitter_probability: float = Field(0.8, ge=0, le=1)
    grayscale_probability: float = Field(0.2, ge=0, le=1)
    blur_probability: float = Field(0.5, ge=0, le=1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = added(0.0, ge=0, le=1)
    normalization: Normalization = added("imagenet")

    @model_validator(mode="after")
    def _blur_range(self) -> AugmentRecipe:
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1] <= MAX_SIGMA:
            raise ValueError(
                f"blur_sigma must satisfy 0 < low <= high <= {MAX_SIGMA:g} pixels, got {list(self.blur_sigma)}"
            )
        return self


# --- photometric operations ------------------------------------------------------------------------------------------


LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2


def _factor(values: Tensor, images: Tensor) -> Tensor:
    return to_device(values.to(images.dtype), images.device).view(-1, 1, 1, 1)


def grayscale(images: Tensor) -> Tensor:
    """Luma: (N, 3, H, W) to (N, 1, H, W)."""
    grey = images[:, 0:1] * LUMA[0]
    return grey.add_(images[:, 1:2], alpha=LUMA[1]).add_(images[:, 2:3], alpha=LUMA[2])


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply each image by its factor; ``factors`` (N,) at least 0."""
    return (images * _factor(factors, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean grey value of each image; ``factors`` (N,)."""
    factor = _factor(factors, images)
    mean = images.mean(dim=(2, 3), keepdim=True)
    # Luma is linear: the mean's luma is the luma's mean. Channels that are no colours count alike.
    mean = grayscale(mean) if images.shape[1] == 3 else mean.mean(dim=1, keepdim=True)
    return (images * factor).add_((1 - factor) * mean).clamp_(0, 1)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image; ``factors`` (N,)."""
    factor = _factor(factors, images)
    return (images * factor).add_(grayscale(images).mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Rotate the hue; ``shifts`` (N,) in [-0.5, 0.5], as shares of the colour circle.

    RGB to HSV and back collapses to one formula per channel. With V the largest channel, C the spread, and the hue h in
    sixths of the circle, a channel is V - C + C · clamp(2 - d, 0, 1), where d is the distance on the circle between h and
    the channel's own place (0 for red, 2 for green, 4 for blue); with t = ||h - place| - 3|, that is clamp(t - 1, 0, 1).
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    spread = value - lowest
    is_red = (value == red).to(images.dtype)  # products are several times faster than torch.where
    is_green = (value == green).to(images.dtype).mul_(1 - is_red)
    hue = (red - green).add_(spread, alpha=4).mul_(1 - is_red - is_green)
    hue.addcmul_((blue - red).add_(spread, alpha=2), is_green).addcmul_(green - blue, is_red)
    hue.div_(spread.clamp(min=1e-12))  # grey pixels: numerator and spread are both 0, so they stay grey
    hue.add_(6 * _factor(shifts, images).squeeze(1))
    hue.sub_((hue / 6).floor_(), alpha=6)  # into [0, 6)
    result = torch.empty_like(images)
    for channel, place in enumerate((0, 2, 4)):
        near = (hue - place).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(lowest, near, spread, out=result[:, channel])
    return result


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each image with its own Gaussian, reflecting at the border.

    The kernel is cut at three standard deviations, which hold 99.7 % of a Gaussian. Its radius stays below the shorter
    side of the image, as reflection padding requires.

    Args:
        images: (N, 3, H, W).
        sigmas: (N,) standard deviations in pixels, above 0.
    """
    result = images.clone()
    radii = (3 * sigmas).ceil().to(torch.int64).clamp(max=min(images.shape[-2:]) - 1)
    # Images with the same radius are blurred together, since their kernels have the same size.
    for radius in sorted(set(radii.tolist())):
        _apply(partial(_blur, radius=radius), result, radii == radius, sigmas)
    return result


def _blur(images: Tensor, sigmas: Tensor, radius: int) -> Tensor:
    height, width = images.shape[-2:]
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (offsets / sigmas[:, None]) ** 2)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    kernels = to_device(kernels.to(images.dtype), images.device)  # (N, taps)
    taps = kernels.T.reshape(2 * radius + 1, -1, 1, 1, 1)
    padded = torch.nn.functional.pad(images, (radius, radius, radius, radius), mode="reflect")
    # A Gaussian is separable: one vertical pass, then one horizontal pass.
    rows = padded[:, :, :height] * taps[0]
    for number in range(1, 2 * radius + 1):
        rows.addcmul_(padded[:, :, number : number + height], taps[number])
    result = rows[..., :width] * taps[0]
    for number in range(1, 2 * radius + 1):
        result.addcmul_(rows[..., number : number + width], taps[number])
    return result


def solarize(images: Tensor) -> Tensor:
    """Invert the pixels from 128 of 255 on, as Pillow does with its usual threshold."""
    return torch.where(images >= 127.5 / 255, 1 - images, images)


@dataclass(frozen=True)
class PhotometricDraws:
    """Parameters drawn for a batch, each (N,); ``order`` (N, 4) permutes brightness, contrast, saturation and hue."""

    jitter: Tensor
    order: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor

    def rows(self, chosen: slice | list[int]) -> PhotometricDraws:
        """The draws of some of the samples."""
        return PhotometricDraws(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def table(self) -> Tensor:
        """(13, N) float32: everything in one tensor, for `photometric_kernels`, which says what is where."""
        jitter = [self.jitter, self.brightness, self.contrast, self.saturation, self.hue]
        after = [self.grayscale, self.blur, self.sigma, self.solarize]
        return torch.stack([values.float() for values in (*jitter, *after, *self.order.T)])


def draw_photometric(recipe: AugmentRecipe, num: int, generator: torch.Generator) -> PhotometricDraws:
    """Draw the parameters of ``num`` samples, independently for each sample."""
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
        # Drawn last, and only if asked for: older recipes keep their draws.
        solarize=torch.rand(num, generator=generator) < recipe.solarize_probability
        if recipe.solarize_probability
        else torch.zeros(num, dtype=torch.bool),
    )


def apply_photometric(images: Tensor, draws: PhotometricDraws) -> Tensor:
    """Jitter, greyscale, blur and solarise (N, C, H, W) images in [0, 1]; the input is not changed.

    Saturation, hue and greyscale are of RGB images only.
    """
    images = images.clone()
    colours = images.shape[1] == 3
    operations = (
        (adjust_brightness, draws.brightness),
        (adjust_contrast, draws.contrast),
        (adjust_saturation, draws.saturation),
        (adjust_hue, draws.hue),
    )
    for position in range(4):
        for number, (operation, values) in enumerate(operations[: 4 if colours else 2]):
            _apply(operation, images, draws.jitter & (draws.order[:, position] == number), values)
    if colours:
        _apply(lambda chosen, _: grayscale(chosen).expand(-1, 3, -1, -1), images, draws.grayscale, draws.sigma)
    _apply(gaussian_blur, images, draws.blur, draws.sigma)
    _apply(lambda chosen, _: solarize(chosen), images, draws.solarize, draws.sigma)
    return images


def _apply(operation: Callable[[Tensor, Tensor], Tensor], images: Tensor, chosen: Tensor, values: Tensor) -> None:
    """Apply ``operation`` in place to the images where ``chosen`` (N,) is true, with their ``values`` (N,)."""
    which = chosen.nonzero().flatten()
    # No need to index if all images are chosen.
    if len(which) == len(images):
        images.copy_(operation(images, values))
    elif len(which):
        there = to_device(which, images.device)
        images[there] = operation(images[there], values[which])


def _kernels(device: torch.device) -> Callable[..., Tensor] | None:
    """The kernels that replace the operators above on a GPU, if they can be used there."""
    if importlib.util.find_spec("triton") is None:  # part of torch's builds for GPUs on Linux
        return None
    from mixmask.engine import photometric_kernels

    return photometric_kernels.photometric if photometric_kernels.usable(device) else None


class Photometric:
    """The photometric half of an `AugmentRecipe`, ready to be applied to batches."""

    def __init__(self, recipe: AugmentRecipe) -> None:
        self.recipe = recipe

    def __call__(self, images: Tensor, generator: torch.Generator, rows: slice | list[int], total: int) -> Tensor:
        """Augment and normalise some rows of a batch.

        Args:
            images: (N, C, H, W) uint8 or float in [0, 1], the rows ``rows``.
            generator: Draws for the global batch, so that a sample's draws do not depend on which rank has it.
            rows: Position of these rows in the global batch.
            total: Rows of the global batch.

        Returns:
            (N, C, H, W), channels last in memory.
        """
        draws = draw_photometric(self.recipe, total, generator).rows(rows)
        if images.is_cuda and images.shape[1] == 3 and (kernels := _kernels(images.device)) is not None:
            mean, std = statistics_of(self.recipe.normalization)
            return kernels(images, to_device(draws.table(), images.device), mean, std, self.recipe.blur_probability > 0)
        result = torch.empty(images.shape, dtype=torch.float32, device=images.device, memory_format=torch.channels_last)
        # On a CPU one image at a time, which stays in a core's cache through all operations.
        together = len(images) if images.device.type != "cpu" else 1
        for start in range(0, len(images), together):
            part = slice(start, start + together)
            augmented = apply_photometric(as_float(images[part]), draws.rows(part))
            result[part] = normalize(augmented, self.recipe.normalization)
        return result
