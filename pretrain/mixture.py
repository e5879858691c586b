"""The interface of a mixture: a recipe that decides which images a step mixes, and with which weights.

A mixture is a class derived from `MixtureRecipe`, or from `Groups` if it mixes images of one batch, in a file of its
own in ``pretrain/mixtures/``. Its fields are the keys under ``mix:`` in configs; ``kind: Literal["…"]`` is its name
there.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from mixmask.engine.augment import AugmentRecipe
from mixmask.engine.collectives import gather
from mixmask.engine.config import Recipe, added
from mixmask.engine.errors import ConfigError
from mixmask.engine.host_values import to_device
from mixmask.engine.late import torch
from mixmask.engine.records import Method

if TYPE_CHECKING:
    from torch import Tensor

Views = tuple["Tensor", "Tensor"]


@dataclass(frozen=True)
class Mixture:
    """Mixed images, and what the loss needs to know about them.

    Attributes:
        name: Key of its loss in the log.
        images: (N, 3, H, W); image i shows a share ``lam[i]`` of i and the rest of image ``perm[i]``.
        lam: (N,) λ, in [0, 1].
        perm: (N,) int64 row of each image's partner: a permutation p of these rows, or with ``across``, rows of the
            global batch.
        switch: Whether the loss of the switch image is added (equation 5).
        mask: (B, 1, H, W) bool, True where image i shows itself, with B = N or 1; None if images are blended.
        across: Whether ``perm`` refers to the rows of all ranks.
        weight: Weight of its term in the step's loss.
        title: Its name in the pictures of ``mixmask show-views``.
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
        """(N,) int64, p⁻¹: mixture ``inverse_perm[i]`` is the one that has image i as its partner."""
        assert not self.across
        return torch.argsort(self.perm)


@dataclass(frozen=True)
class Rows:
    """This rank's rows of the global batch: ``num`` rows from ``start`` on, of ``total``."""

    start: int
    num: int
    total: int

    @classmethod
    def all(cls, num: int) -> Rows:
        """All ``num`` rows of a batch, for a single process."""
        return cls(0, num, num)

    def groups(self, count: int) -> list[range]:
        """The rows of each of ``count`` equal groups of the whole batch."""
        assert self.total % count == 0
        each = self.total // count
        return [range(start, start + each) for start in range(0, self.total, each)]

    def hold(self, group: range) -> range:
        """This rank's rows of a group, as rows of the global batch; empty if it has none."""
        return range(max(group.start, self.start), min(group.stop, self.start + self.num))


@dataclass(frozen=True)
class Column:
    """A column of ``mixmask show-views``: one picture and one caption for each image."""

    heading: str
    images: Tensor  # (N, 3, H, W), normalised like the views; masks are in [0, 1]
    captions: Sequence[str]
    is_mask: bool = False


class MixtureRecipe(Recipe, ABC):
    """Base of the mixtures' recipes.

    A step's loss is ``clean_weight`` · L(q, k) plus a term for each mixture that `draw` returns (`pretrain.step`).
    """

    kind: str

    clean_name: ClassVar[str] = "clean"  # key of the clean term in the log

    @property
    @abstractmethod
    def method(self) -> Method:
        """The method's name in records and tables."""

    @property
    def num_mixtures(self) -> int:
        """Number of mixtures that `draw` returns."""
        return 0

    @property
    def hides(self) -> bool:
        """Whether the query side sees other views than the key side (`hide`)."""
        return type(self).hide is not MixtureRecipe.hide

    @property
    def clean_weight(self) -> float:
        """Weight of the clean term."""
        return 1.0

    def check(self, augment: AugmentRecipe, rows: int) -> None:
        """Refuse sizes that do not fit.

        Args:
            augment: The augmentation of the full views.
            rows: Images whose loss is computed at once, summed over all ranks.

        Raises:
            ValueError: If a size does not fit; the message names the key.
        """

    def extra_views(self, augment: AugmentRecipe) -> list[AugmentRecipe]:
        """The augmentations of further views, besides the two full ones."""
        return []

    def hide(self, views: Views, both: bool, rng: random.Random, rows: Rows | None = None) -> Views:
        """The two views as the query side sees them, (N, 3, H, W) each; unchanged by default.

        Args:
            views: The two full views.
            both: Whether both views serve as queries, or only the first.
            rng: In the same state on every rank.
            rows: Which rows of the global batch these are; all of them by default.
        """
        return views

    def draw(self, views: Sequence[Tensor], rng: random.Random, rows: Rows | None = None) -> list[Mixture]:
        """The mixtures of one step.

        Args:
            views: (N, 3, H, W) augmented, normalised views: two full ones, then the extra ones.
            rng: Source of masks, coefficients and permutations; in the same state on every rank.
            rows: Which rows of the global batch the images are; all of them by default. If a group spans several ranks,
                the images of all ranks are gathered, so every rank must call this.
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
    """Mix (N, 3, H, W) images as a pretraining step mixes its first view.

    Args:
        recipe: A mixture, such as `mixmask.MixMask`.
        images: Augmented and normalised.
        rng: Source of masks, coefficients and permutations.
        rows: With several processes, which rows of the global batch these are; all of them by default.

    Raises:
        ConfigError: If ``recipe`` is not a mixture or ``rng`` is not a `random.Random`.
    """
    if not isinstance(recipe, MixtureRecipe) or not isinstance(rng, random.Random):
        given = f"{type(recipe).__name__} and {type(rng).__name__}"
        raise ConfigError(f"a mixture, such as mixmask.MixMask(grid=8), and a random.Random were expected, got {given}")
    return recipe.draw([images], rng, rows)


def mixture_loss(own_losses: Tensor, switched_losses: Tensor | None, mixture: Mixture) -> Tensor:
    """λ · L(q_mix, k) + (1 - λ) · L(q_mix[p⁻¹], k), averaged over the batch (equation 6).

    The second term is summed in the order of the mixtures: mixture i is compared with the key of its partner p(i). With
    j = p(i) this is the equation's pair of mixture p⁻¹(j) and key j.

    Args:
        own_losses: (N,) loss of mixture i against key i.
        switched_losses: (N,) loss of mixture i against key p(i); None drops the term.
        mixture: The mixture that the queries were made from.

    Raises:
        ConfigError: If there is not one loss per image, for example because the loss was averaged already.
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
    """How one group of images is mixed: the partners, and a mask (True keeps the image itself) or a blend.

    Attributes:
        perm: Partner of each image, a permutation of the group.
        lam: (1,) or one λ for each image of the group.
        mask: (B, 1, H, W) bool, with B as in ``lam``; None blends the images.
        switch: Whether the loss of the switch image is added.
        title: The mixture's name in the pictures of ``mixmask show-views``.
    """

    perm: list[int]
    lam: Tensor
    mask: Tensor | None = None
    switch: bool = True
    title: str = ""


class Groups(MixtureRecipe):
    """Base of mixtures of the images of one batch; a subclass implements `draw_group`.

    ``mask_groups`` is the number of groups of consecutive rows, each with its own draws and partners. They are drawn
    for the global batch, so they do not depend on the number of processes. The authors' code draws on each of eight
    devices: 8 groups of a batch of 256.
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
        """Draw how to mix one group of ``num`` images of height × width pixels.

        Returns:
            ``num_mixtures`` draws, by the mixture's name in the log.
        """

    @override
    def draw(self, views: Sequence[Tensor], rng: random.Random, rows: Rows | None = None) -> list[Mixture]:
        images = views[0]
        rows = rows or Rows.all(len(images))
        height, width = images.shape[-2:]
        groups = rows.groups(self.mask_groups)
        # Every rank draws for all groups, also those of other ranks, so that `rng` stays in the same state everywhere.
        drawn = [self.draw_group(len(group), height, width, rng) for group in groups]
        # If every rank holds whole groups, all partners are local and no images are exchanged.
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
    """Mix this rank's rows; ``everyone`` holds the images of the global batch from row ``first`` on."""
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
            keep = (
                float(draw.lam[0])
                if len(draw.lam) == 1
                else to_device(draw.lam[inside], mine.device)[:, None, None, None]
            )
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
        # Un-Mix may blend some groups and mask others; then there is no mask for all rows.
        torch.cat(masks) if len(masks) == len(mixed) else None,
        across=len(everyone) > len(images),
        title=drawn[0].title,
    )


def reverse_permutation(num: int) -> list[int]:
    """N-1, …, 1, 0: the paper's default partners, the batch in reverse order (equation 1)."""
    return list(range(num - 1, -1, -1))


def random_permutation(num: int, rng: random.Random) -> list[int]:
    """A uniformly random permutation of 0, …, ``num`` - 1."""
    order = list(range(num))
    rng.shuffle(order)
    return order


def mix_by_mask(images: Tensor, mask: Tensor, perm: Tensor, everyone: Tensor | None = None) -> Tensor:
    """x_mix[i] = M · x[i] + (1 - M) · x[p(i)] (equation 1).

    Args:
        images: (N, 3, H, W).
        mask: (H, W), (1, 1, H, W) or (N, 1, H, W) bool, True keeps the image itself.
        perm: (N,) int64 row of each image's partner in ``everyone``.
        everyone: The images that partners are taken from; ``images`` by default.
    """
    others = images if everyone is None else everyone
    return as_stored(torch.where(to_device(mask, images.device), images, others[perm]), images)


def as_stored(mixed: Tensor, images: Tensor) -> Tensor:
    """``mixed`` in the memory format of ``images``.

    `torch.where` and indexing may change the format, and convolutions would convert it back at a cost.
    """
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return mixed.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
