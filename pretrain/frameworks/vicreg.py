"""VICReg (arXiv:2105.04906)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.heads import mlp
from mixmask.pretrain.batch_loss import BatchLossFramework, off_diagonal, weighted_mean
from mixmask.pretrain.framework import MAX_WIDTH, Clean, Encoder, FrameworkRecipe, Views

EPSILON, LEAST_STD = 1e-4, 1.0  # ε and γ of equation 1


class VICRegRecipe(FrameworkRecipe):
    """Two views' embeddings are pulled together, their components kept spread and uncorrelated.

    The three coefficients are λ, μ and ν of equation 6 in the paper (section 4.2 has their values). The projector
    ("expander") has two hidden layers with batch normalisation and a last layer without bias. Statistics are over the images
    of all processes; with ``accumulate``, over one part.
    """

    kind: Literal["vicreg"] = "vicreg"
    dim: int = Field(8192, ge=2, le=MAX_WIDTH)
    projector_layers: int = Field(3, ge=1, le=10)
    projector_width: int = Field(8192, ge=1, le=MAX_WIDTH)
    invariance: float = Field(25.0, ge=0)
    variance: float = Field(25.0, ge=0)
    covariance: float = Field(1.0, ge=0)

    @override
    def build(self, backbone: BackboneRecipe) -> VICReg:
        return VICReg(self, backbone)


class VICReg(BatchLossFramework):
    """One encoder for both views."""

    asks_with_both_views = False

    def __init__(self, recipe: VICRegRecipe, backbone: BackboneRecipe) -> None:
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
        """λ s + μ (v + v') / 2 + ν (c + c') with every mean weighted.

        As in the published code, s is the mean over components, too, and the hinges of both views are averaged (equations
        1, 4 and 5 of the paper with those factors).
        """
        distance = weighted_mean((query - key).square(), weights).mean()
        (hinge, products), (other_hinge, other_products) = (
            _hinge_and_products(embedding, weights) for embedding in (query, key)
        )
        recipe = self.recipe
        loss = recipe.invariance * distance + recipe.variance * (hinge + other_hinge) / 2
        return loss + recipe.covariance * (products + other_products)

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """The first view is the query, the second the key; the loss is symmetric in them."""
        query, key = self.query(queries[0]), self.query(keys[1])
        return Clean(self.loss(query, key), query, (key,))


def _hinge_and_products(embedding: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The hinge on the standard deviations (equation 1), and the squared covariances (equation 3)."""
    num, dim = embedding.shape
    centred = embedding - weighted_mean(embedding, weights)
    covariance = (weights[:, None] * centred).T @ centred / (num - 1)
    std = (torch.diagonal(covariance) + EPSILON).sqrt()
    return F.relu(LEAST_STD - std).mean(), off_diagonal(covariance).square().sum() / dim
