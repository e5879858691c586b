"""What a mixture is to pretraining: a recipe that says which images a step mixes, and with which weights.

A mixture is a class derived from `MixtureRecipe`, or from `Groups` if it mixes images of one batch, in a file of its own in
``pretrain/mixtures/``. Its fields are the keys under ``mix:`` in configs, ``kind: Literal["…"]`` is its name there.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mixmask.engine.augment import AugmentRecipe
from mixmask.engine.config import Recipe, added
from mixmask.engine.distributed import gather
from mixmask.engine.errors import ConfigError
from mixmask.engine.precision import to_device
from mixmask.engine.records import Method

Views = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Mixture:
    """Mixed images and what the loss needs to know of them.

    Attributes:
        name: Of its loss in the log.
        images: (N, 3, H, W); image i shows a share ``lam[i]`` of i and the rest of image ``perm[i]``.
        lam: (N,) λ, in [0, 1].
        perm: (N,) int64: of these rows, a permutation p; with ``across``, of the rows of all processes.
        switch: Whether the switch image's loss counts, too (equation 5).
        mask: (B, 1, H, W) bool, True where image i shows itself, B being N or 1; None where images are blended.
        across: Whether ``perm`` names rows of other processes.
        weight: Of its term in the step's loss.
        title: What pictures call it.
    """

    name: str
    images: Tensor
    lam: Tensor
    perm: Tensor
    switch: bool = True
    mask: Tensor | None = None
    across: bool = False
    weight: float = 1.0
    title: str = ""

    @property
    def inverse_perm(self) -> Tensor:
        """(N,) int64, p⁻¹: the mixture that shows i as the other image is number ``inverse_perm[i]``."""
        assert not self.across
        return torch.argsort(self.perm)


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


@dataclass(frozen=True)
class Column:
    """A column of ``mixmask show-views``: one picture and one caption for each image."""

    heading: str
    images: Tensor  # (N, 3, H, W), normalised as the views are; of masks, in [0, 1]
    captions: Sequence[str]
    is_mask: bool = False


class MixtureRecipe(Recipe, ABC):
    """A mixture and what it is told.

    A step's loss is ``clean_weight`` · L(q, k) plus a term for each mixture that `draw` gives (`pretrain.step`).
    """

    kind: str

    clean_name: ClassVar[str] = "clean"  # of the first term in the log

    @property
    @abstractmethod
    def method(self) -> Method:
        """The method's name in records and tables."""

    @property
    def num_mixtures(self) -> int:
        """How many mixtures `draw` gives."""
        return 0

    @property
    def clean_weight(self) -> float:
        """Weight of the first term."""
        return 1.0

    def check(self, augment: AugmentRecipe, rows: int) -> None:
        """Refuse sizes that do not fit.

        Args:
            augment: The training view.
            rows: Images whose loss is computed at once, over all processes.

        Raises:
            ValueError: With the key and what would be valid.
        """

    def extra_views(self, augment: AugmentRecipe) -> list[AugmentRecipe]:
        """How further views of an image are drawn, besides the two full ones."""
        return []

    def hide(self, views: Views, both: bool, rng: random.Random, rows: Rows | None = None) -> Views:
        """What the query side sees of the two views, (N, 3, H, W) each; by default all of them.

        Args:
            views: The views.
            both: Whether the framework asks with both of them, or with the first.
            rng: In the same state on every process.
            rows: Which rows of the whole batch these are; all of it by default.
        """
        return views

    def draw(self, views: Sequence[Tensor], rng: random.Random, rows: Rows | None = None) -> list[Mixture]:
        """The mixtures of one step.

        Args:
            views: (N, 3, H, W) augmented, normalised views: two full ones, then the extra ones.
            rng: Where masks, coefficients and permutations come from; in the same state on every process.
            rows: Which rows of the whole batch the images are; all of it by default. Where a group's rows lie on several
                processes, the images are gathered from all of them, so every process must call this.
        """
        return []

    def pictures(self, views: Sequence[Tensor], rng: random.Random) -> Iterator[Column]:
        """What ``mixmask show-views`` shows beside the views: masks, mixtures and switch images."""
        for mixture in self.draw(views, rng):
            num = len(mixture.images)
            lam, perm, inverse = mixture.lam.tolist(), mixture.perm.tolist(), mixture.inverse_perm.tolist()
            title = mixture.title or mixture.name
            if mixture.mask is not None:
                yield Column(f"{title} mask", mixture.mask.expand(num, 3, -1, -1).float(), [""] * num, is_mask=True)
            others = ["itself" if perm[i] == i else str(perm[i] + 1) for i in range(num)]
            captions = [f"λ {lam[i]:.2f}, with {others[i]}" for i in range(num)]
            yield Column(f"{title} mixture", mixture.images, captions)
            if mixture.switch:
                captions = [f"1 - λ = {1 - lam[inverse[i]]:.2f}" for i in range(num)]
                yield Column(f"{title} switch", mixture.images[inverse], captions)


def draw_mixtures(recipe: MixtureRecipe, images: Tensor, rng: random.Random, rows: Rows | None = None) -> list[Mixture]:
    """The mixtures of (N, 3, H, W) images, as a step of pretraining draws them from its first view.

    Args:
        recipe: Such as `mixmask.MixMask`.
        images: Augmented, normalised.
        rng: Where masks, coefficients and permutations come from.
        rows: Which rows of a batch that several processes share these are; all of it by default.

    Raises:
        ConfigError: If the recipe is none, or ``rng`` is no `random.Random`.
    """
    if not isinstance(recipe, MixtureRecipe) or not isinstance(rng, random.Random):
        given = f"{type(recipe).__name__} and {type(rng).__name__}"
        raise ConfigError(f"a mixture, such as mixmask.MixMask(grid=8), and a random.Random were expected, got {given}")
    return recipe.draw([images], rng, rows)


def mixture_loss(own_losses: Tensor, switched_losses: Tensor | None, mixture: Mixture) -> Tensor:
    """λ · L(q_mix, k) + (1 - λ) · L(q_mix[p⁻¹], k), averaged over the batch (equation 6).

    The second term's sum over the batch is taken in the order of the mixtures: mixture i against the key of the
    other image p(i) is the pair that the equation calls mixture p⁻¹(j) against key j.

    Args:
        own_losses: (N,) loss of mixture i against key i.
        switched_losses: (N,) loss of mixture i against key p(i); None drops the term.
        mixture: The mixture that the queries were made from.

    Raises:
        ConfigError: If the losses are not one per image, as those are that a loss has averaged already.
    """
    for losses in (own_losses, switched_losses):
        if losses is not None and losses.shape != mixture.lam.shape:
            raise ConfigError(
                f"one loss per image was expected, ({len(mixture.lam)},), got {tuple(losses.shape)}: take the loss without "
                f"its mean"
            )
    loss = mixture.lam * own_losses
    if switched_losses is not None:
        loss = loss + (1 - mixture.lam) * switched_losses
    return loss.mean()


# --- mixtures of the images of one batch -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """How one group of images is mixed: by a mask (True keeps the image itself), or blended; and with whom.

    Attributes:
        perm: The other image of each, a permutation of the group.
        lam: (1,) or one λ for each image of the group.
        mask: (B, 1, H, W), B as in ``lam``; None blends.
        switch: Whether the switch image's loss counts, too.
        title: What pictures call the mixture.
    """

    perm: list[int]
    lam: Tensor
    mask: Tensor | None = None
    switch: bool = True
    title: str = ""


class Groups(MixtureRecipe):
    """A mixture of images of one batch. A subclass says in `draw_group` how.

    ``mask_groups``: into how many groups of consecutive rows a batch is split, each with draws and partners of its own.
    They are drawn for the whole batch, so that the number of processes does not change them. The authors' code draws on
    each of eight devices: 8 groups of a batch of 256.
    """

    mask_groups: int = added(1, ge=1, le=4096)

    @override
    def check(self, augment: AugmentRecipe, rows: int) -> None:
        groups = self.mask_groups
        if groups > 1 and (rows % groups or rows // groups < 2):
            raise ValueError(
                f"mix.mask_groups {groups}: {rows} images at once cannot be split in {groups} equal groups of at least 2"
            )

    @property
    @override
    def num_mixtures(self) -> int:
        return 1

    @abstractmethod
    def draw_group(self, num: int, height: int, width: int, rng: random.Random) -> dict[str, Draw]:
        """What is drawn for a group of ``num`` images of height × width pixels, by the mixture's name in the log.

        There are as many as ``num_mixtures`` says.
        """

    @override
    def draw(self, views: Sequence[Tensor], rng: random.Random, rows: Rows | None = None) -> list[Mixture]:
        images = views[0]
        rows = rows or Rows.all(len(images))
        height, width = images.shape[-2:]
        groups = rows.groups(self.mask_groups)
        drawn = [self.draw_group(len(group), height, width, rng) for group in groups]
        across = rows.num % len(groups[0]) != 0
        everyone, first = (gather(images), 0) if across else (images, rows.start)
        return [
            _mixture(name, rows, groups, [one[name] for one in drawn], images, everyone, first) for name in drawn[0]
        ]


def _mixture(
    name: str,
    rows: Rows,
    groups: Sequence[range],
    drawn: Sequence[Draw],
    images: Tensor,
    everyone: Tensor,
    first: int,
) -> Mixture:
    """Mix this process's rows; ``everyone`` are the images from row ``first`` of the whole batch on."""
    mixed, lams, perms, masks = [], [], [], []
    for group, draw in zip(groups, drawn, strict=True):
        own = rows.hold(group)
        if not own:
            continue
        inside = slice(own.start - group.start, own.stop - group.start)
        perm = to_device(torch.tensor([group.start - first + p for p in draw.perm[inside]]), images.device)
        lam = (draw.lam.expand(len(group)) if len(draw.lam) == 1 else draw.lam).float()
        mine = images[own.start - rows.start : own.stop - rows.start]
        if draw.mask is None:
            keep = float(draw.lam[0])
            mixed.append(keep * mine + (1 - keep) * everyone[perm])
        else:
            mask = draw.mask if len(draw.mask) == 1 else draw.mask[inside]
            mixed.append(mix_by_mask(mine, mask, perm, everyone))
            masks.append(mask if len(groups) == 1 else mask.expand(len(own), -1, -1, -1))
        lams.append(lam[inside])
        perms.append(perm)
    return Mixture(
        name,
        as_stored(mixed[0] if len(mixed) == 1 else torch.cat(mixed), images),
        to_device(torch.cat(lams), images.device),
        torch.cat(perms),
        drawn[0].switch,
        torch.cat(masks) if len(masks) == len(mixed) else None,
        across=len(everyone) > len(images),
        title=drawn[0].title,
    )


def reverse_permutation(num: int) -> list[int]:
    """N-1, …, 1, 0: the partner that the paper gives each image by default (equation 1)."""
    return list(range(num - 1, -1, -1))


def random_permutation(num: int, rng: random.Random) -> list[int]:
    """A uniform permutation."""
    order = list(range(num))
    rng.shuffle(order)
    return order


def mix_by_mask(images: Tensor, mask: Tensor, perm: Tensor, everyone: Tensor | None = None) -> Tensor:
    """x_mix[i] = M · x[i] + (1 - M) · x[p(i)] (equation 1).

    Args:
        images: (N, 3, H, W).
        mask: (H, W), (1, 1, H, W) or (N, 1, H, W) bool, True keeps the image itself.
        perm: (N,) permutation; or rows of ``everyone``.
        everyone: Where the other images come from, if not from ``images``.
    """
    others = images if everyone is None else everyone
    return as_stored(torch.where(to_device(mask, images.device), images, others[perm]), images)


def as_stored(mixed: Tensor, images: Tensor) -> Tensor:
    """In the memory order of the images that went in: `torch.where` and indexing may change it, and convolutions would
    change it back at a cost."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return mixed.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
