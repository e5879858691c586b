"""Erasing (MSCN, arXiv:2206.07700): no images are mixed, a part of the query image is hidden."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator
from typing_extensions import override

from mixmask.engine.augment import AugmentRecipe
from mixmask.engine.host_values import to_device
from mixmask.engine.late import torch
from mixmask.engine.records import Method
from mixmask.pretrain.mask_options import MaskOptions
from mixmask.pretrain.mixture import Column, Draw, Mixture, Rows, Views, as_stored

if TYPE_CHECKING:
    from torch import Tensor


class Erase(MaskOptions):
    """Erase the masked area of the query image (MSCN, arXiv:2206.07700), the baseline for MixMask's filling.

    The erased view replaces the clean one on the query side and has full weight, whatever its area: the "symmetric"
    loss of the paper's footnote 1. ``mask`` lists patterns, one of which is drawn for each view and mask group:
    ``random`` cells, ``focal`` (one rectangle is kept) or ``channelwise`` (random cells, drawn separately for each
    colour channel). ``fill`` is standard normal noise or zero (the mean colour). ``extra_crops`` is a number of small
    views, also erased, which are further queries; the loss is the mean over the query views.
    """

    clean_name: ClassVar[str] = "erased"
    kind: Literal["erase"] = "erase"
    mask: tuple[Literal["random", "focal", "channelwise"], ...] = Field(
        ("random", "focal", "channelwise"), min_length=1
    )
    fill: Literal["zero", "noise"] = "noise"
    mask_per: Literal["batch", "sample"] = "sample"
    extra_crops: int = Field(0, ge=0, le=8)
    extra_crop: int = Field(96, ge=8, description="side of the small views in pixels")
    extra_scale: tuple[float, float] = (0.05, 0.2)

    @field_validator("extra_scale")
    @classmethod
    def _extra_scale(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"extra_scale must satisfy 0 < low <= high <= 1, got {list(scale)}")
        return scale

    @property
    @override
    def method(self) -> Method:
        return "mscn"

    @property
    @override
    def num_mixtures(self) -> int:
        return self.extra_crops

    @property
    @override
    def clean_weight(self) -> float:
        return 1 / (1 + self.extra_crops)

    @override
    def check(self, augment: AugmentRecipe, rows: int) -> None:
        super().check(augment, rows)
        if self.extra_crops and self.grid > self.extra_crop:
            raise ValueError(f"mix.grid {self.grid} does not fit a view of mix.extra_crop {self.extra_crop} pixels")

    @override
    def extra_views(self, augment: AugmentRecipe) -> list[AugmentRecipe]:
        return [augment.model_copy(update={"crop": self.extra_crop, "scale": self.extra_scale})] * self.extra_crops

    @override
    def hide(self, views: Views, both: bool, rng: random.Random, rows: Rows | None = None) -> Views:
        first = erase(self, views[0], rng, rows)
        return first, erase(self, views[1], rng, rows) if both else views[1]

    @override
    def draw(self, views: Sequence[Tensor], rng: random.Random, rows: Rows | None = None) -> list[Mixture]:
        """Each erased small view as one more query, with full weight against its own image's key; nothing is mixed."""
        num, device = len(views[0]), views[0].device
        lam, perm = torch.ones(num, device=device), torch.arange(num, device=device)
        hidden = [erase(self, view, rng, rows) for view in views[2:]]
        return [Mixture("small", view, lam, perm, switch=False, weight=self.clean_weight) for view in hidden]

    @override
    def draw_group(self, num: int, height: int, width: int, rng: random.Random) -> dict[str, Draw]:
        return {}  # no image is mixed with another one: `hide` and `draw` erase

    @override
    def pictures(self, views: Sequence[Tensor], rng: random.Random) -> Iterator[Column]:
        names = ["view 1, erased", "view 2, erased", *(f"small {i + 1}, erased" for i in range(len(views) - 2))]
        for name, view in zip(names, views, strict=True):
            yield Column(name, erase(self, view, rng), [""] * len(view))


def erase(recipe: Erase, images: Tensor, rng: random.Random, rows: Rows | None = None) -> Tensor:
    """Hide the masked area of (N, 3, H, W) normalised images behind zeros or standard normal noise.

    Args:
        recipe: The patterns and the filling.
        images: The images.
        rng: In the same state on every rank.
        rows: Which rows of the global batch the images are; all of them by default.
    """
    rows = rows or Rows.all(len(images))
    num, channels, height, width = images.shape
    masks = []
    for group in rows.groups(recipe.mask_groups):
        pattern = rng.choice(recipe.mask)
        channelwise = pattern == "channelwise"
        mask, _ = recipe.draw_masks(
            "random" if channelwise else pattern,
            len(group),
            height,
            width,
            rng,
            channels=channels if channelwise else 1,
        )
        own = rows.hold(group)
        if own:
            inside = slice(own.start - group.start, own.stop - group.start)
            mask = mask if len(mask) == 1 else mask[inside]
            # Groups differ in their number of masks and channels: expanded, they can be concatenated.
            masks.append(mask if recipe.mask_groups == 1 else mask.expand(len(own), channels, -1, -1))
    mask = torch.cat(masks)
    if recipe.fill == "noise":
        generator = torch.Generator(images.device).manual_seed(rng.getrandbits(63))
        # Noise for the global batch, so that a row's noise does not depend on the number of ranks.
        whole = torch.randn(
            (rows.total, channels, height, width), generator=generator, device=images.device, dtype=images.dtype
        )
        filling = whole[rows.start : rows.start + num]
    else:
        filling = torch.zeros((), device=images.device, dtype=images.dtype)
    return as_stored(torch.where(to_device(mask, images.device), images, filling), images)
