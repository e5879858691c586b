"""The network and the loss of VICReg (arXiv:2105.04906)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.batch_loss import BatchLossFramework, off_diagonal, weighted_mean
from mixmask.pretrain.frameworks.vicreg import VICRegRecipe

EPSILON, LEAST_STD = 1e-4, 1.0  # ε and γ of equation 1


class VICReg(BatchLossFramework):
    """One encoder for both views, and the spread and covariances of its embeddings."""

    recordable = True

    def __init__(self, recipe: VICRegRecipe, backbone: BackboneRecipe) -> None:
        super().__init__(recipe, backbone)
        self.recipe = recipe

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


def _hinge_and_products(embedding: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The hinge on the standard deviations (equation 1), and the squared covariances (equations 3 and 4)."""
    num, dim = embedding.shape
    centred = embedding - weighted_mean(embedding, weights)
    covariance = (weights[:, None] * centred).T @ centred / (num - 1)
    std = (torch.diagonal(covariance) + EPSILON).sqrt()
    return F.relu(LEAST_STD - std).mean(), off_diagonal(covariance).square().sum() / dim
