"""Random crops, drawn and cut for many images at once or for one."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from mixmask.engine.config import Recipe, added
from mixmask.engine.host_values import to_device
from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor


class CropRecipe(Recipe):
    """A random resized crop and a flip: the defaults of supervised training at 224 pixels.

    ``interpolation`` is how a crop is resized; ``bicubic`` is Pillow's (a = -0.5), as W-MSE's code has it.
    """

    crop: int = Field(224, ge=8, le=4096)
    scale: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(0.5, ge=0, le=1)
    interpolation: Literal["bilinear", "bicubic"] = added("bilinear")

    @model_validator(mode="after")
    def _crop_ranges(self) -> CropRecipe:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got {list(self.scale)}")
        if not 0.01 <= self.aspect[0] <= self.aspect[1] <= 100:
            raise ValueError(f"aspect must satisfy 0.01 <= low <= high <= 100, got {list(self.aspect)}")
        return self


def draw_crops(
    sizes: Tensor, scale: tuple[float, float], aspect: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Random resized crops (torchvision's RandomResizedCrop) for many images at once.

    Up to ten attempts per image, with the area uniform in ``scale`` and the aspect ratio log-uniform. If none fits, the
    largest central crop whose aspect ratio lies in ``aspect``.

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
    uniform = torch.rand(4, num, 10, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[0])
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = torch.exp(low + (high - low) * uniform[1])
    w = torch.sqrt(area * ratio).round()
    h = torch.sqrt(area / ratio).round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    # All ten attempts are drawn at once; argmax gives the first one that fits.
    first = fits.to(torch.int64).argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first), h.gather(1, first)
    top = (uniform[2].gather(1, first) * (height - h + 1)).floor()
    left = (uniform[3].gather(1, first) * (width - w + 1)).floor()
    none = ~fits.any(dim=1, keepdim=True)
    if none.any():
        wide, tall = width / height > aspect[1], width / height < aspect[0]
        fallback_w = torch.where(wide, (height * aspect[1]).round(), width)
        fallback_h = torch.where(tall, (width / aspect[0]).round(), height)
        w, h = torch.where(none, fallback_w, w), torch.where(none, fallback_h, h)
        top = torch.where(none, ((height - h) / 2).floor(), top)
        left = torch.where(none, ((width - w) / 2).floor(), left)
    return torch.cat([top, left, h, w], dim=1).to(torch.int64)


def draw_crop(height: int, width: int, recipe: CropRecipe, rng: random.Random) -> tuple[int, int, int, int, bool]:
    """Like `draw_crops`, for one image and in plain Python, which is cheap enough for a data loader worker.

    Returns:
        Top, left, height and width of the crop in pixels, and whether it is flipped.
    """
    flip = rng.random() < recipe.flip
    low, high = math.log(recipe.aspect[0]), math.log(recipe.aspect[1])
    for _ in range(10):
        area = height * width * rng.uniform(*recipe.scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randrange(height - h + 1), rng.randrange(width - w + 1), h, w, flip
    h, w = height, width
    if width / height > recipe.aspect[1]:
        w = round(height * recipe.aspect[1])
    elif width / height < recipe.aspect[0]:
        h = round(width / recipe.aspect[0])
    return (height - h) // 2, (width - w) // 2, h, w, flip


def crop_and_flip(images: Tensor, crops: Tensor, flips: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """Cut, resize and flip a batch of images of one size, each with its own crop.

    Equal to cropping and then resizing each image, without anti-aliasing: meant for crops no larger than ``size``.

    Args:
        images: (N, 3, H, W) uint8.
        crops: (N, 4) top, left, height, width.
        flips: (N,) bool.
        size: Side of the result in pixels.
        interpolation: ``bilinear``, or ``bicubic`` as Pillow has it.

    Returns:
        (N, 3, size, size) float in [0, 1].
    """
    num, _, height, width = images.shape
    if interpolation == "bicubic":
        crops = to_device(crops.float(), images.device)
        rows = _cubic_weights(crops[:, 0], crops[:, 2], height, size)
        columns = _cubic_weights(crops[:, 1], crops[:, 3], width, size)
        columns = torch.where(to_device(flips, images.device)[:, None, None], columns.flip(1), columns)
        # First along rows, then along columns, each with a clamp, as Pillow does it.
        across = torch.einsum("nxw,nchw->nchx", columns, images.float() / 255).clamp_(0, 1)
        return torch.einsum("nyh,nchx->ncyx", rows, across).clamp_(0, 1)
    # Coordinates are worked out on the host: they are few, and a GPU would start twenty small operations for them.
    crops = crops.float()
    centre = torch.arange(size, dtype=torch.float32) + 0.5

    def positions(start: Tensor, length: Tensor, mirrored: Tensor | None) -> Tensor:
        place = centre.expand(num, size)
        if mirrored is not None:
            place = torch.where(mirrored[:, None], size - place, place)
        inside = place * (length / size)[:, None] - 0.5
        # Clamped to the crop, so that pixels outside of it are not blended in at its border.
        return start[:, None] + torch.minimum(inside.clamp(min=0), length[:, None] - 1)

    y = positions(crops[:, 0], crops[:, 2], None)
    x = positions(crops[:, 1], crops[:, 3], flips)
    places = to_device(torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1]), images.device)
    grid = torch.stack(
        [places[0][:, None, :].expand(num, size, size), places[1][:, :, None].expand(num, size, size)], dim=-1
    )
    return torch.nn.functional.grid_sample(
        images.float() / 255, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _cubic_weights(start: Tensor, length: Tensor, extent: int, size: int) -> Tensor:
    """(N, size, extent): the weight of each source pixel along one side for each output pixel.

    Keys' cubic kernel with a = -0.5. Pixels outside the crop have weight 0, and the weights of an output pixel add up
    to one. A crop larger than ``size`` widens the kernel, which is Pillow's anti-aliasing.
    """
    scale = length / size
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale[:, None]  # (N, size)
    pixel = torch.arange(extent, device=start.device) + 0.5
    distance = ((pixel - centre[:, :, None]) / scale.clamp(min=1)[:, None, None]).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])  # (N, extent)
    weights = weights * inside[:, None, :]
    return weights / weights.sum(dim=2, keepdim=True)
