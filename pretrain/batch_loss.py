"""Losses of a whole batch, such as Barlow Twins' and VICReg's, and what they become for mixed images.

The paper's equation 6 weighs the loss of each mixed image by its area: the mean over images of λ L(q, k). A loss of a batch
is no mean over images. It is a function of statistics that are means over images: means, variances, products. So the
weights go there. In the mixed term every image enters each statistic with the weight λ, divided by the sum of the weights,
and the whole term is multiplied by the mean of λ:

    mean(λ) · L(statistics weighted by λ)

Three properties make this the counterpart of equation 6. With the same λ for all images (one mask for the batch, the paper's
default) it is λ L(q, k), to the letter. With λ = 1 it is L(q, k). And an image with λ = 0, of which nothing can be seen,
changes nothing. The term of the switch image has the weights 1 - λ and the keys of the partners, as always.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.collectives import gather
from mixmask.engine.differentiable import gather_with_gradient
from mixmask.engine.heads import mlp
from mixmask.pretrain.batch_loss_recipe import BatchLossRecipe
from mixmask.pretrain.network import Clean, Encoder, Framework, Views


class BatchLossFramework(Framework):
    """One encoder for both views, and one loss for the global batch, which every rank computes from the rows of all."""

    keys_have_gradient = True
    asks_with_both_views = False

    def __init__(self, recipe: BatchLossRecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        trunk = build_trunk(backbone)
        hidden = [recipe.projector_width] * (recipe.projector_layers - 1)
        self.encoder = Encoder(trunk, mlp([width_of(trunk), *hidden, recipe.dim], norm=True, last_bias=False))

    @override
    def query(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.encoder(images)
        return embedding

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """The first view is the query, the second the key; the loss is symmetric in them."""
        query, key = self.query(queries[0]), self.query(keys[1])
        return Clean(self.loss(query, key), query, (key,))

    @abstractmethod
    def batch_loss(self, query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            query: (N, dim) embeddings of the global batch.
            key: (N, dim), of the same images.
            weights: (N,) of the images in all statistics, with the sum N.

        Returns:
            A scalar.
        """

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """(N,): the loss of the batch, the same for every image."""
        return self.mixed_loss(query, key, torch.ones(len(query), device=query.device)).expand(len(query))

    @override
    def mixed_loss(self, query: Tensor, key: Tensor, lam: Tensor) -> Tensor:
        """mean(λ) · L with statistics weighted by λ (see this module's text); 0 if nothing is seen of any image."""
        shares = gather(lam).to(query.dtype)
        mean = shares.mean()
        weights = shares / mean.clamp(min=1e-6)
        # In fp32, as the encoder gives them: sums over thousands of products are too coarse in half precision.
        with torch.autocast(query.device.type, enabled=False):
            loss = self.batch_loss(gather_with_gradient(query), gather_with_gradient(key), weights)
        return mean * loss


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """(N, dim) to (dim,): the mean with the (N,) weights, whose sum is N."""
    return (weights[:, None] * values).mean(dim=0)


def off_diagonal(matrix: Tensor) -> Tensor:
    """The elements of a square matrix off its diagonal, in one row."""
    size = len(matrix)
    return matrix.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten()
