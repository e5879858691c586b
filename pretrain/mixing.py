"""Mixtures of the images of a batch, the permutations that belong to them, and their losses.

MixMask (section 3, equations 1-6), Un-Mix (arXiv:2003.05438), both together, and erasing (MSCN, arXiv:2206.07700), which
mixes nothing and hides a part of the query's image.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from engine.config import Recipe
from engine.precision import to_device
from engine.records import Method
from pretrain.masks import PATTERNS, to_pixels


class NoMix(Recipe):
    """The framework as published: clean views only."""

    kind: Literal["none"] = "none"
    num_mixtures: ClassVar[int] = 0

    @property
    def method(self) -> Method:
        """The method's name in records and tables."""
        return "vanilla"


def _checked_ratio(ratio: float | tuple[float, float]) -> float | tuple[float, float]:
    if isinstance(ratio, tuple):
        if not 0 <= ratio[0] < ratio[1] <= 1:
            raise ValueError(f"ratio must satisfy 0 <= low < high <= 1, got {list(ratio)}")
    elif not 0 < ratio < 1:
        raise ValueError(f"ratio must lie in (0, 1), or be a range [low, high] to draw from, got {ratio}")
    return ratio


class MaskOptions(Recipe):
    """What every masking mixture has.

    ``grid`` is in cells per side (2 for CIFAR, 4 for Tiny-ImageNet, 8 for ImageNet, table 1). ``ratio`` is the nominal share
    of cells that keep the image itself, or a range [a, b] from which it is drawn uniformly for each mask; λ is always the
    area of the mask that was drawn. ``exact_ratio`` sets exactly round(ratio · grid²) cells. ``mask_per: sample`` draws a
    mask for each image instead of one for the batch (both are ours).
    """

    grid: int = Field(8, ge=2)
    ratio: float | tuple[float, float] = 0.5
    exact_ratio: bool = False
    mask_per: Literal["batch", "sample"] = "batch"

    _ratio = field_validator("ratio")(_checked_ratio)


class MixMask(MaskOptions):
    """Masked regions filled with another image (section 3.1).

    ``switch: false`` drops the loss of the switch image, ``mask: discrete`` sets each cell on its own (ablations of table
    1); ``partner: random`` takes a random permutation instead of the reverse order.
    """

    kind: Literal["mixmask"] = "mixmask"
    num_mixtures: ClassVar[int] = 1
    mask: Literal["block", "discrete"] = "block"
    switch: bool = True
    partner: Literal["reverse", "random"] = "reverse"

    @property
    def method(self) -> Method:
        """The method's name in records and tables."""
        return "mixmask"


class UnMix(Recipe):
    """Mixup with probability ``unmix_prob``, else CutMix, one draw for the batch (arXiv:2003.05438, section 3)."""

    kind: Literal["unmix"] = "unmix"
    num_mixtures: ClassVar[int] = 1
    unmix_prob: float = Field(0.5, ge=0, le=1)

    @property
    def method(self) -> Method:
        """The method's name in records and tables."""
        return "unmix"


class MixMaskUnMix(MaskOptions):
    """MixMask upon Un-Mix, the paper's MixMask∗: five terms, L(q, k), two of Un-Mix's mixture and two of MixMask's.

    Un-Mix mixes in reverse order; MixMask takes a random permutation (``permutation: different``), or the reverse order too
    (``same``, the ablation of table 2).
    """

    kind: Literal["mixmask+unmix"] = "mixmask+unmix"
    num_mixtures: ClassVar[int] = 2
    mask: Literal["block", "discrete"] = "block"
    switch: bool = True
    unmix_prob: float = Field(0.5, ge=0, le=1)
    permutation: Literal["different", "same"] = "different"

    @property
    def method(self) -> Method:
        """The method's name in records and tables."""
        return "mixmask+unmix"


class Erase(MaskOptions):
    """The query's image loses its masked area (MSCN, arXiv:2206.07700): the baseline that filling is compared with.

    The erased view takes the clean one's place on the query side and counts fully, whatever its area: the "symmetric" loss
    of the paper's footnote 1. ``mask`` names the patterns of which one is drawn at each step: ``random`` cells, ``focal``
    (one rectangle kept), ``channelwise`` (random cells, for each colour channel on its own). ``fill`` is standard normal
    noise or zero (the mean colour). ``extra_crops`` small views, erased too, are further queries; the loss is the mean over
    the query views.
    """

    kind: Literal["erase"] = "erase"
    num_mixtures: ClassVar[int] = 0
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
    def method(self) -> Method:
        """The method's name in records and tables."""
        return "mscn"


Masking = MixMask | MixMaskUnMix | Erase
MixRecipe = Annotated[NoMix | MixMask | UnMix | MixMaskUnMix | Erase, Field(discriminator="kind")]


@dataclass(frozen=True)
class Mixture:
    """Mixed images and what the loss needs to know of them.

    Attributes:
        name: Of its loss in the log.
        images: (N, 3, H, W); image i shows a share ``own[i]`` of i and the rest of its partner ``partner[i]``.
        own: (N,) λ, in (0, 1).
        partner: (N,) int64, a permutation p.
        switch: Whether the switch image's loss counts, too.
        mask: (B, 1, H, W) bool, True where image i shows itself, B being N or 1; None where nothing is masked.
    """

    name: str
    images: Tensor
    own: Tensor
    partner: Tensor
    switch: bool = True
    mask: Tensor | None = None

    @property
    def switched(self) -> Tensor:
        """(N,) int64, p⁻¹: the mixture in which i is the partner is number ``switched[i]``."""
        return torch.argsort(self.partner)


# --- masks of a batch ------------------------------------------------------------------------------------------------


def draw_masks(recipe: Masking, num: int, height: int, width: int, draws: random.Random) -> tuple[Tensor, Tensor]:
    """Masks for a batch, in pixels.

    Returns:
        (B, C, height, width) bool, True where the image itself is kept, and (B,) λ; B is ``num`` or, for one mask per batch,
        1; C is 3 for channel-wise masks, else 1.
    """
    pattern = draws.choice(recipe.mask) if isinstance(recipe, Erase) else recipe.mask
    channels = 3 if pattern == "channelwise" else 1
    build = PATTERNS["random" if pattern == "channelwise" else pattern]
    cells = []
    for _ in range(num if recipe.mask_per == "sample" else 1):
        ratio = draws.uniform(*recipe.ratio) if isinstance(recipe.ratio, tuple) else recipe.ratio
        cells.append([build(recipe.grid, ratio, draws, recipe.exact_ratio) for _ in range(channels)])
    pixels, own = to_pixels(torch.tensor(cells), height, width)
    return pixels, own.mean(dim=1)


# --- mixing ----------------------------------------------------------------------------------------------------------


def reverse_permutation(num: int, device: torch.device) -> Tensor:
    """N-1, …, 1, 0: the partner that the paper gives each image by default (equation 1)."""
    return torch.arange(num - 1, -1, -1, device=device)


def random_permutation(num: int, device: torch.device, draws: random.Random) -> Tensor:
    """A uniform permutation."""
    order = list(range(num))
    draws.shuffle(order)
    return to_device(torch.tensor(order), device)


def mix_by_mask(images: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    """x_mix[i] = M · x[i] + (1 - M) · x[p(i)] (equation 1).

    Args:
        images: (N, 3, H, W).
        mask: (H, W), (1, 1, H, W) or (N, 1, H, W) bool, True keeps the image itself.
        partner: (N,) permutation.
    """
    return _like(torch.where(to_device(mask, images.device), images, images[partner]), images)


def _mixmask(recipe: MixMask | MixMaskUnMix, images: Tensor, reverse: bool, draws: random.Random) -> Mixture:
    num, _, height, width = images.shape
    mask, own = draw_masks(recipe, num, height, width, draws)
    if reverse:
        partner = reverse_permutation(num, images.device)
    else:
        partner = random_permutation(num, images.device, draws)
    mixed = mix_by_mask(images, mask, partner)
    return Mixture("mixmask", mixed, to_device(own, images.device).expand(num), partner, recipe.switch, mask)


def cut_box(height: int, width: int, keep: float, centre_y: int, centre_x: int) -> tuple[int, int, int, int, float]:
    """CutMix's box as Un-Mix cuts it: sides √(1 - keep) of the image's, clipped at its border.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        keep: Share of the image that the unclipped box leaves, in [0, 1].
        centre_y: Row of the centre, in [0, height).
        centre_x: Column of the centre, in [0, width).

    Returns:
        Top, bottom, left, right (exclusive), and the share of the image outside the clipped box.
    """
    side = (1 - keep) ** 0.5
    cut_height, cut_width = int(height * side), int(width * side)
    top, bottom = max(centre_y - cut_height // 2, 0), min(centre_y + cut_height // 2, height)
    left, right = max(centre_x - cut_width // 2, 0), min(centre_x + cut_width // 2, width)
    return top, bottom, left, right, 1 - (bottom - top) * (right - left) / (height * width)


def _unmix(probability: float, images: Tensor, draws: random.Random) -> Mixture:
    num, _, height, width = images.shape
    partner = reverse_permutation(num, images.device)
    keep = draws.random()  # Beta(1, 1) is the uniform distribution
    if draws.random() < probability:
        mixed = keep * images + (1 - keep) * images[partner]
    else:
        centre = draws.randrange(height), draws.randrange(width)
        top, bottom, left, right, keep = cut_box(height, width, keep, *centre)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
    own = torch.full((num,), keep, device=images.device)
    return Mixture("unmix", _like(mixed, images), own, partner)


def draw_mixtures(recipe: MixRecipe, images: Tensor, draws: random.Random) -> list[Mixture]:
    """The mixtures of one step.

    Args:
        recipe: What to mix.
        images: (N, 3, H, W) augmented, normalised views of the query side.
        draws: Where masks, coefficients and permutations come from.

    Returns:
        None, one or two mixtures.
    """
    mixtures = []
    if isinstance(recipe, UnMix | MixMaskUnMix):
        mixtures.append(_unmix(recipe.unmix_prob, images, draws))
    if isinstance(recipe, MixMask):
        mixtures.append(_mixmask(recipe, images, recipe.partner == "reverse", draws))
    if isinstance(recipe, MixMaskUnMix):
        mixtures.append(_mixmask(recipe, images, recipe.permutation == "same", draws))
    return mixtures


def mixture_loss(own_losses: Tensor, switched_losses: Tensor | None, mixture: Mixture) -> Tensor:
    """λ · L(q_mix, k) + (1 - λ) · L(q_mix[p⁻¹], k), averaged over the batch (equation 6).

    Args:
        own_losses: (N,) loss of mixture i against key i.
        switched_losses: (N,) loss of mixture p⁻¹(i) against key i; None drops the term.
        mixture: The mixture that the queries were made from.
    """
    loss = mixture.own * own_losses
    if switched_losses is not None:
        loss = loss + (1 - mixture.own[mixture.switched]) * switched_losses
    return loss.mean()


# --- erasing ---------------------------------------------------------------------------------------------------------


def erase(recipe: Erase, images: Tensor, draws: random.Random) -> Tensor:
    """Hide the masked area of (N, 3, H, W) normalised images behind zeros or standard normal noise."""
    num, _, height, width = images.shape
    mask, _ = draw_masks(recipe, num, height, width, draws)
    if recipe.fill == "noise":
        generator = torch.Generator(images.device).manual_seed(draws.getrandbits(63))
        filling = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    else:
        filling = torch.zeros((), device=images.device, dtype=images.dtype)
    return _like(torch.where(to_device(mask, images.device), images, filling), images)


def _like(mixed: Tensor, images: Tensor) -> Tensor:
    """In the memory order of the images that went in: `torch.where` and indexing may change it, and convolutions would
    change it back at a cost."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return mixed.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
