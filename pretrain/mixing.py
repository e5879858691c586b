"""Mixtures of images in a batch and the permutations that belong to them (MixMask, equations 1-6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from engine.config import Recipe
from pretrain.masks import block_cells, to_pixels


class NoMix(Recipe):
    """The framework as published: clean views only."""

    kind: Literal["none"] = "none"


class MixMask(Recipe):
    """Masked regions filled with another image (section 3.1).

    ``grid`` is in cells per side (2 for CIFAR, 4 for Tiny-ImageNet, 8 for ImageNet, table 1), ``ratio`` the nominal share
    of cells that keep the image itself, ``switch: false`` drops the loss of the switch image (ablation of table 1).
    """

    kind: Literal["mixmask"] = "mixmask"
    mask: Literal["block"] = "block"
    grid: int = Field(8, ge=2)
    ratio: float = Field(0.5, gt=0, lt=1)
    switch: bool = True


MixRecipe = Annotated[NoMix | MixMask, Field(discriminator="kind")]


@dataclass(frozen=True)
class Mixture:
    """Mixed images and what the loss needs to know of them.

    Attributes:
        images: (N, 3, H, W); image i shows a share ``own[i]`` of i and the rest of its partner ``partner[i]``.
        own: (N,) λ, in (0, 1).
        partner: (N,) int64, a permutation p.
    """

    images: Tensor
    own: Tensor
    partner: Tensor

    @property
    def switched(self) -> Tensor:
        """(N,) int64, p⁻¹: the mixture in which i is the partner is number ``switched[i]``."""
        return torch.argsort(self.partner)


def reverse_permutation(num: int, device: torch.device) -> Tensor:
    """N-1, …, 1, 0: the partner that the paper gives each image by default (equation 1)."""
    return torch.arange(num - 1, -1, -1, device=device)


def mix_by_mask(images: Tensor, mask: Tensor, own: float, partner: Tensor) -> Mixture:
    """x_mix[i] = M · x[i] + (1 - M) · x[p(i)] (equation 1).

    Args:
        images: (N, 3, H, W).
        mask: (H, W) bool, True keeps the image itself.
        own: Share of True pixels.
        partner: (N,) permutation.
    """
    mixed = torch.where(mask.to(images.device), images, images[partner])
    return Mixture(mixed, torch.full((len(images),), own, device=images.device), partner)


def draw_mixture(recipe: MixMask, images: Tensor, generator: torch.Generator) -> Mixture:
    """Draw one mask for the batch and mix each image with its counterpart in reverse order."""
    height, width = images.shape[-2:]
    mask, own = to_pixels(block_cells(recipe.grid, recipe.ratio, generator), height, width)
    return mix_by_mask(images, mask, own, reverse_permutation(len(images), images.device))


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
