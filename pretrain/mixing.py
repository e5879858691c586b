"""Mixtures of the images of a batch, the permutations that belong to them, and their losses.

MixMask (section 3, equations 1-6), Un-Mix (arXiv:2003.05438), both together, and erasing (MSCN, arXiv:2206.07700), which
mixes nothing and hides a part of the query's image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from engine.config import Recipe, added
from engine.distributed import gather
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


class Groups(Recipe):
    """``mask_groups``: into how many groups of consecutive rows a batch is split, each with draws and partners of its own.

    They are drawn for the whole batch, so that the number of processes does not change them. The authors' code draws on each
    of eight devices: 8 groups of a batch of 256.
    """

    mask_groups: int = added(1, ge=1, le=4096)


class MaskOptions(Groups):
    """What every masking mixture has.

    ``grid`` is in cells per side (2 for CIFAR, 4 for Tiny-ImageNet, 8 for ImageNet, table 1). ``ratio`` is the nominal share
    of cells that keep the image itself, or a range [a, b] from which it is drawn uniformly for each mask; λ is always the
    area of the mask that was drawn. ``exact_ratio`` sets exactly round(ratio · grid²) cells. ``mask_per: sample`` draws a
    mask for each image instead of one for the batch, or for each of ``mask_groups`` (both are ours).
    """

    grid: int = Field(8, ge=2, le=4096)
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


class UnMix(Groups):
    """Mixup with probability ``unmix_prob``, else CutMix, one draw for the batch or group (arXiv:2003.05438, section 3)."""

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
        partner: (N,) int64: of these rows, a permutation p; with ``across``, of the rows of all processes.
        switch: Whether the switch image's loss counts, too.
        mask: (B, 1, H, W) bool, True where image i shows itself, B being N or 1; None where nothing is masked.
        across: Whether partners may be rows of other processes.
    """

    name: str
    images: Tensor
    own: Tensor
    partner: Tensor
    switch: bool = True
    mask: Tensor | None = None
    across: bool = False

    @property
    def switched(self) -> Tensor:
        """(N,) int64, p⁻¹: the mixture in which i is the partner is number ``switched[i]``."""
        assert not self.across
        return torch.argsort(self.partner)


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch this process has: ``num`` from ``start`` on, of ``total`` of all processes."""

    start: int
    num: int
    total: int

    @classmethod
    def all(cls, num: int) -> Rows:
        """Of one process, every row."""
        return cls(0, num, num)

    def groups(self, count: int) -> list[range]:
        """The rows of each of ``count`` equal groups of the whole batch."""
        assert self.total % count == 0
        each = self.total // count
        return [range(start, start + each) for start in range(0, self.total, each)]

    def hold(self, group: range) -> range:
        """The rows of a group that this process has."""
        return range(max(group.start, self.start), min(group.stop, self.start + self.num))


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


def reverse_permutation(num: int) -> list[int]:
    """N-1, …, 1, 0: the partner that the paper gives each image by default (equation 1)."""
    return list(range(num - 1, -1, -1))


def random_permutation(num: int, draws: random.Random) -> list[int]:
    """A uniform permutation."""
    order = list(range(num))
    draws.shuffle(order)
    return order


def mix_by_mask(images: Tensor, mask: Tensor, partner: Tensor, everyone: Tensor | None = None) -> Tensor:
    """x_mix[i] = M · x[i] + (1 - M) · x[p(i)] (equation 1).

    Args:
        images: (N, 3, H, W).
        mask: (H, W), (1, 1, H, W) or (N, 1, H, W) bool, True keeps the image itself.
        partner: (N,) permutation; or rows of ``everyone``.
        everyone: Where partners come from, if not from ``images``.
    """
    others = images if everyone is None else everyone
    return _like(torch.where(to_device(mask, images.device), images, others[partner]), images)


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


@dataclass(frozen=True)
class _Draw:
    """How one group is mixed: by a mask (True keeps the image itself), or blended; and with whom."""

    partner: list[int]
    own: Tensor  # (1,) or one for each row of the group
    mask: Tensor | None = None  # (B, 1, H, W), B as in ``own``
    keep: float = 1.0  # of a blend


def _draw_unmix(probability: float, num: int, height: int, width: int, draws: random.Random) -> _Draw:
    keep = draws.random()  # Beta(1, 1) is the uniform distribution
    partner = reverse_permutation(num)
    if draws.random() < probability:
        return _Draw(partner, torch.tensor([keep]), keep=keep)
    centre = draws.randrange(height), draws.randrange(width)
    top, bottom, left, right, keep = cut_box(height, width, keep, *centre)
    mask = torch.ones(1, 1, height, width, dtype=torch.bool)
    mask[:, :, top:bottom, left:right] = False
    return _Draw(partner, torch.tensor([keep]), mask)


def _draw_mixmask(
    recipe: MixMask | MixMaskUnMix, reverse: bool, num: int, height: int, width: int, draws: random.Random
) -> _Draw:
    mask, own = draw_masks(recipe, num, height, width, draws)
    return _Draw(reverse_permutation(num) if reverse else random_permutation(num, draws), own, mask)


def _draw_group(recipe: MixRecipe, num: int, height: int, width: int, draws: random.Random) -> dict[str, _Draw]:
    """What is drawn for one group of a batch, by the mixture's name."""
    drawn: dict[str, _Draw] = {}
    if isinstance(recipe, UnMix | MixMaskUnMix):
        drawn["unmix"] = _draw_unmix(recipe.unmix_prob, num, height, width, draws)
    if isinstance(recipe, MixMask):
        drawn["mixmask"] = _draw_mixmask(recipe, recipe.partner == "reverse", num, height, width, draws)
    if isinstance(recipe, MixMaskUnMix):
        drawn["mixmask"] = _draw_mixmask(recipe, recipe.permutation == "same", num, height, width, draws)
    return drawn


def draw_mixtures(recipe: MixRecipe, images: Tensor, draws: random.Random, rows: Rows | None = None) -> list[Mixture]:
    """The mixtures of one step.

    Args:
        recipe: What to mix.
        images: (N, 3, H, W) augmented, normalised views of the query side.
        draws: Where masks, coefficients and permutations come from; in the same state on every process.
        rows: Which rows of the whole batch the images are; all of it by default. Where a group's rows lie on several
            processes, the images are gathered from all of them, so every process must call this.

    Returns:
        None, one or two mixtures.
    """
    if isinstance(recipe, NoMix | Erase):
        return []
    rows = rows or Rows.all(len(images))
    height, width = images.shape[-2:]
    groups = rows.groups(recipe.mask_groups)
    drawn = [_draw_group(recipe, len(group), height, width, draws) for group in groups]
    across = rows.num % len(groups[0]) != 0
    everyone, first = (gather(images), 0) if across else (images, rows.start)
    mixtures = []
    for name in drawn[0]:
        switch = name == "unmix" or not isinstance(recipe, MaskOptions) or recipe.switch
        mixtures.append(_mixture(name, switch, rows, groups, [one[name] for one in drawn], images, everyone, first))
    return mixtures


def _mixture(
    name: str,
    switch: bool,
    rows: Rows,
    groups: Sequence[range],
    drawn: Sequence[_Draw],
    images: Tensor,
    everyone: Tensor,
    first: int,
) -> Mixture:
    """Mix this process's rows; ``everyone`` are the images from row ``first`` of the whole batch on."""
    mixed, owns, partners, masks = [], [], [], []
    for group, draw in zip(groups, drawn, strict=True):
        own = rows.hold(group)
        if not own:
            continue
        inside = slice(own.start - group.start, own.stop - group.start)
        partner = torch.tensor([group.start - first + p for p in draw.partner[inside]])
        lam = draw.own.expand(len(group)) if len(draw.own) == 1 else draw.own
        mine, theirs = images[own.start - rows.start : own.stop - rows.start], to_device(partner, images.device)
        if draw.mask is None:
            mixed.append(draw.keep * mine + (1 - draw.keep) * everyone[theirs])
        else:
            mask = draw.mask if len(draw.mask) == 1 else draw.mask[inside]
            mixed.append(mix_by_mask(mine, mask, theirs, everyone))
            masks.append(mask if len(groups) == 1 else mask.expand(len(own), -1, -1, -1))
        owns.append(lam[inside])
        partners.append(theirs)
    return Mixture(
        name,
        _like(mixed[0] if len(mixed) == 1 else torch.cat(mixed), images),
        to_device(torch.cat(owns), images.device),
        torch.cat(partners),
        switch,
        torch.cat(masks) if name == "mixmask" else None,
        across=len(everyone) > len(images),
    )


def mixture_loss(own_losses: Tensor, switched_losses: Tensor | None, mixture: Mixture) -> Tensor:
    """λ · L(q_mix, k) + (1 - λ) · L(q_mix[p⁻¹], k), averaged over the batch (equation 6).

    The second term's sum over the batch is taken in the order of the mixtures: mixture i against the key of its partner
    p(i) is the pair that the equation calls mixture p⁻¹(j) against key j.

    Args:
        own_losses: (N,) loss of mixture i against key i.
        switched_losses: (N,) loss of mixture i against key p(i); None drops the term.
        mixture: The mixture that the queries were made from.
    """
    loss = mixture.own * own_losses
    if switched_losses is not None:
        loss = loss + (1 - mixture.own) * switched_losses
    return loss.mean()


# --- erasing ---------------------------------------------------------------------------------------------------------


def erase(recipe: Erase, images: Tensor, draws: random.Random, rows: Rows | None = None) -> Tensor:
    """Hide the masked area of (N, 3, H, W) normalised images behind zeros or standard normal noise.

    Args:
        recipe: What to hide.
        images: The images.
        draws: In the same state on every process.
        rows: Which rows of the whole batch the images are; all of it by default.
    """
    rows = rows or Rows.all(len(images))
    num, channels, height, width = images.shape
    masks = []
    for group in rows.groups(recipe.mask_groups):
        mask, _ = draw_masks(recipe, len(group), height, width, draws)
        own = rows.hold(group)
        if own:
            inside = slice(own.start - group.start, own.stop - group.start)
            mask = mask if len(mask) == 1 else mask[inside]
            masks.append(mask if recipe.mask_groups == 1 else mask.expand(len(own), channels, -1, -1))
    mask = torch.cat(masks)
    if recipe.fill == "noise":
        generator = torch.Generator(images.device).manual_seed(draws.getrandbits(63))
        whole = torch.randn(
            (rows.total, channels, height, width), generator=generator, device=images.device, dtype=images.dtype
        )
        filling = whole[rows.start : rows.start + num]
    else:
        filling = torch.zeros((), device=images.device, dtype=images.dtype)
    return _like(torch.where(to_device(mask, images.device), images, filling), images)


def _like(mixed: Tensor, images: Tensor) -> Tensor:
    """In the memory order of the images that went in: `torch.where` and indexing may change it, and convolutions would
    change it back at a cost."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return mixed.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
