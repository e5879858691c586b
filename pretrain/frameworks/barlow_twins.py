"""Barlow Twins (arXiv:2103.03230)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.heads import mlp
from mixmask.pretrain.batch_loss import BatchLossFramework, off_diagonal, weighted_mean
from mixmask.pretrain.framework import MAX_WIDTH, Clean, Encoder, FrameworkRecipe, Views

EPSILON = 1e-5  # of the batch normalisation of the embeddings


class BarlowTwinsRecipe(FrameworkRecipe):
    """The cross-correlation of two views' embeddings is pulled to the identity.

    ``off_diagonal`` is λ of equation 1, called so because λ is an area here. The projector has two hidden layers with batch
    normalisation and a last layer without bias (section 2.2). Statistics are over the images of all processes; with
    ``accumulate``, over one part.
    """

    kind: Literal["barlowtwins"] = "barlowtwins"
    dim: int = Field(8192, ge=2, le=MAX_WIDTH)
    projector_layers: int = Field(3, ge=1, le=10)
    projector_width: int = Field(8192, ge=1, le=MAX_WIDTH)
    off_diagonal: float = Field(0.0051, ge=0)
    scale: float = Field(1.0, gt=0, description="of the whole loss, as solo-learn's recipes have it")

    @override
    def build(self, backbone: BackboneRecipe) -> BarlowTwins:
        return BarlowTwins(self, backbone)


class BarlowTwins(BatchLossFramework):
    """One encoder for both views."""

    asks_with_both_views = False

    def __init__(self, recipe: BarlowTwinsRecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        trunk = build_trunk(backbone)
        hidden = [recipe.projector_width] * (recipe.projector_layers - 1)
        self.encoder = Encoder(trunk, mlp([width_of(trunk), *hidden, recipe.dim], norm=True, last_bias=False))

    @override
    def query(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.encoder(images)
        return embedding

    @override
    def batch_loss(self, query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
        """Σ (1 - C_ii)² + λ Σ C_ij² of the cross-correlation C (equations 1 and 2); every mean is weighted."""
        query, key = _normalised(query, weights), _normalised(key, weights)
        correlation = (weights[:, None] * query).T @ key / len(query)
        invariance = (torch.diagonal(correlation) - 1).square().sum()
        redundancy = off_diagonal(correlation).square().sum()
        return self.recipe.scale * (invariance + self.recipe.off_diagonal * redundancy)

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """The first view is the query, the second the key; the loss is symmetric in them."""
        query, key = self.query(queries[0]), self.query(keys[1])
        return Clean(self.loss(query, key), query, (key,))


def _normalised(embedding: Tensor, weights: Tensor) -> Tensor:
    """Batch normalisation without weight and bias, with the weights in mean and variance."""
    centred = embedding - weighted_mean(embedding, weights)
    return centred / (weighted_mean(centred.square(), weights) + EPSILON).sqrt()
