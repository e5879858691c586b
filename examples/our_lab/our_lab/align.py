"""A framework: alignment and uniformity on the sphere (arXiv:2005.10242), whose loss is not a mean over images."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.heads import mlp
from mixmask.pretrain.framework import FrameworkRecipe
from mixmask.pretrain.network import Clean, Encoder, Framework, Views, unit


class AlignRecipe(FrameworkRecipe):
    """L = alignment + ``weight`` · uniformity (section 4.1 of the paper)."""

    kind: Literal["align"] = "align"
    dim: int = Field(64, ge=2)
    weight: float = Field(1.0, ge=0)

    @override
    def build(self, backbone: BackboneRecipe) -> Align:
        return Align(self, backbone)


class Align(Framework):
    """One encoder for both views; queries and keys have a gradient."""

    keys_have_gradient = True

    def __init__(self, recipe: AlignRecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        trunk = build_trunk(backbone)
        self.encoder = Encoder(trunk, mlp([width_of(trunk), recipe.dim], norm=False))

    @override
    def query(self, images: Tensor) -> Tensor:
        return unit(self.encoder(images))

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """(N,) squared distances, each with the same uniformity of the batch added."""
        return (query - key).square().sum(dim=1) + self.recipe.weight * _uniformity(query)

    def mixed_loss(self, query: Tensor, key: Tensor, lam: Tensor) -> Tensor:
        """Alignment is a mean over images, each weighted by its λ; the batch's uniformity is weighted by the mean λ."""
        return (lam * (query - key).square().sum(dim=1)).mean() + self.recipe.weight * lam.mean() * _uniformity(query)

    @override
    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        query, key = self.query(queries[0]), self.query(keys[1])
        return Clean((self.loss(query, key) + self.loss(key, query)) / 2, query, (key,))


def _uniformity(embedding: Tensor) -> Tensor:
    return torch.pdist(embedding.float()).square().mul(-2).exp().mean().log()
