"""The options that all masking mixtures share: the grid, the ratio, and how masks are drawn."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator
from typing_extensions import override

from mixmask.engine.augment import AugmentRecipe
from mixmask.engine.late import torch
from mixmask.pretrain.masks import PATTERNS, to_pixels
from mixmask.pretrain.mixture import Groups

if TYPE_CHECKING:
    from torch import Tensor


def _checked_ratio(ratio: float | tuple[float, float]) -> float | tuple[float, float]:
    if isinstance(ratio, tuple):
        if not 0 <= ratio[0] < ratio[1] <= 1:
            raise ValueError(f"ratio must satisfy 0 <= low < high <= 1, got {list(ratio)}")
    elif not 0 < ratio < 1:
        raise ValueError(f"ratio must lie in (0, 1), or be a range [low, high] to draw from, got {ratio}")
    return ratio


class MaskOptions(Groups):
    """The options that all masking mixtures share.

    ``grid`` is in cells per side (2 for CIFAR, 4 for Tiny-ImageNet, 8 for ImageNet, table 1). ``ratio`` is the nominal
    share of cells that keep the image itself, or a range [a, b] from which it is drawn uniformly for each mask; λ is
    always the area of the mask as drawn. ``exact_ratio`` sets exactly round(ratio · grid²) cells. ``mask_per: sample``
    draws a mask for each image instead of one per batch or mask group. The last two are not in the paper.
    """

    grid: int = Field(8, ge=2, le=4096)
    ratio: float | tuple[float, float] = 0.5
    exact_ratio: bool = False
    mask_per: Literal["batch", "sample"] = "batch"

    _ratio = field_validator("ratio")(_checked_ratio)

    @override
    def check(self, augment: AugmentRecipe, rows: int) -> None:
        if self.grid > augment.crop:
            raise ValueError(
                f"mix.grid {self.grid} does not fit an image of augment.crop {augment.crop} pixels; "
                f"valid: 2 … {augment.crop}"
            )
        super().check(augment, rows)

    def draw_masks(
        self, pattern: str, num: int, height: int, width: int, rng: random.Random, channels: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Masks for ``num`` images, in pixels.

        Args:
            pattern: A key of `pretrain.masks.PATTERNS`.
            num: Number of images.
            height: Image height in pixels.
            width: Image width in pixels.
            rng: Source of all draws.
            channels: Masks per image: 3 for one per colour channel, 1 for a shared one.

        Returns:
            (B, channels, height, width) bool, True where the image itself is kept, and (B,) λ; B is ``num`` or, for one
            mask per batch, 1.
        """
        cells = []
        for _ in range(num if self.mask_per == "sample" else 1):
            ratio = rng.uniform(*self.ratio) if isinstance(self.ratio, tuple) else self.ratio
            cells.append([PATTERNS[pattern](self.grid, ratio, rng, self.exact_ratio) for _ in range(channels)])
        pixels, lam = to_pixels(torch.tensor(cells), height, width)
        return pixels, lam.mean(dim=1)
