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

from mixmask.engine.distributed import gather, gather_with_gradient
from mixmask.pretrain.framework import Framework


class BatchLossFramework(Framework):
    """A framework whose loss is one number for the global batch; every rank computes it from the rows of all."""

    keys_have_gradient = True

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
        # In fp32: sums over thousands of products are too coarse in half precision.
        with torch.autocast(query.device.type, enabled=False):
            loss = self.batch_loss(
                gather_with_gradient(query.float() if query.dtype != torch.float64 else query),
                gather_with_gradient(key.float() if key.dtype != torch.float64 else key),
                shares / mean.clamp(min=1e-6),
            )
        return mean * loss


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """(N, dim) to (dim,): the mean with the (N,) weights, whose sum is N."""
    return (weights[:, None] * values).mean(dim=0)


def off_diagonal(matrix: Tensor) -> Tensor:
    """The elements of a square matrix off its diagonal, in one row."""
    size = len(matrix)
    return matrix.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten()
