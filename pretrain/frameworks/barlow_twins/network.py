"""The network and the loss of Barlow Twins (arXiv:2103.03230)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.batch_loss import BatchLossFramework, off_diagonal, weighted_mean
from mixmask.pretrain.frameworks.barlow_twins import BarlowTwinsRecipe

EPSILON = 1e-5  # of the batch normalisation of the embeddings


class BarlowTwins(BatchLossFramework):
    """One encoder for both views, and the cross-correlation of its embeddings."""

    recordable = True

    def __init__(self, recipe: BarlowTwinsRecipe, backbone: BackboneRecipe) -> None:
        super().__init__(recipe, backbone)
        self.recipe = recipe

    @override
    def batch_loss(self, query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
        """Σ (1 - C_ii)² + λ Σ C_ij² of the cross-correlation C (equations 1 and 2); every mean is weighted."""
        query, key = _normalised(query, weights), _normalised(key, weights)
        correlation = (weights[:, None] * query).T @ key / len(query)
        invariance = (torch.diagonal(correlation) - 1).square().sum()
        redundancy = off_diagonal(correlation).square().sum()
        return self.recipe.scale * (invariance + self.recipe.off_diagonal * redundancy)


def _normalised(embedding: Tensor, weights: Tensor) -> Tensor:
    """Batch normalisation without weight and bias, with the weights in mean and variance."""
    centred = embedding - weighted_mean(embedding, weights)
    return centred / (weighted_mean(centred.square(), weights) + EPSILON).sqrt()
