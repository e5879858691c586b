"""MoCo v1 and v2 (arXiv:1911.05722, arXiv:2003.04297)."""

from __future__ import annotations

import copy
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from engine.backbones import BackboneRecipe, build_trunk
from engine.config import Recipe
from pretrain.split_batch_norm import SplitBatchNorm2d


class MoCoRecipe(Recipe):
    """Momentum contrast: ``moco`` has a linear head, ``mocov2`` a two-layer one of the trunk's width.

    ``bn_splits`` is the number of groups in which batch statistics are taken on one device (1 switches it off).
    """

    kind: Literal["mocov2", "moco"] = "mocov2"
    dim: int = Field(128, ge=1)
    queue_size: int = Field(65536, ge=1)
    momentum: float = Field(0.999, ge=0, lt=1)
    temperature: float = Field(0.2, gt=0)
    bn_splits: int = Field(8, ge=1)


class Encoder(nn.Module):
    """A trunk and its projection head; images (N, 3, H, W) to unit vectors (N, dim)."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, images: Tensor) -> Tensor:
        """Project and L2-normalise in fp32."""
        return F.normalize(self.head(self.trunk(images)).float(), dim=1)


class MoCo(nn.Module):
    """Query encoder, its momentum copy for the keys, and the queue of negative keys.

    The weights come from torch's global generator.
    """

    queue: Tensor
    queue_position: Tensor

    def __init__(self, recipe: MoCoRecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        trunk = build_trunk(backbone, partial(SplitBatchNorm2d, num_splits=recipe.bn_splits))
        width = int(trunk.num_features)  # type: ignore[arg-type]
        head: nn.Module = nn.Linear(width, recipe.dim)
        if recipe.kind == "mocov2":
            head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), head)
        self.query_encoder = Encoder(trunk, head)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(recipe.queue_size, recipe.dim), dim=1))  # (K, dim)
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))

    @property
    def trunk(self) -> nn.Module:
        """The part that is kept after pretraining."""
        return self.query_encoder.trunk

    def query(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, dim) unit vectors, with gradient."""
        embedding: Tensor = self.query_encoder(images)
        return embedding

    @torch.no_grad()
    def key(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Move the key encoder towards the query encoder, then embed the keys in shuffled order.

        Shuffling matters together with `SplitBatchNorm2d`: a key is normalised with other images than its query.

        Returns:
            (N, dim) unit vectors, in the order of ``images``, without gradient.
        """
        m = self.recipe.momentum
        for slow, fast in zip(self.key_encoder.parameters(), self.query_encoder.parameters(), strict=True):
            slow.mul_(m).add_(fast, alpha=1 - m)
        order = torch.randperm(len(images), generator=generator).to(images.device)
        embedding: Tensor = self.key_encoder(images[order])
        return embedding[torch.argsort(order)]

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """InfoNCE of each query against its key and the queue (arXiv:1911.05722, equation 1).

        Args:
            query: (N, dim) unit vectors.
            key: (N, dim) unit vectors; key i is the positive of query i.

        Returns:
            (N,) losses.
        """
        with torch.autocast(query.device.type, enabled=False):
            positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
            negative = query @ self.queue.T  # (N, K)
            logits = torch.cat([positive, negative], dim=1) / self.recipe.temperature
            return torch.logsumexp(logits, dim=1) - logits[:, 0]

    @torch.no_grad()
    def enqueue(self, key: Tensor) -> None:
        """Replace the oldest keys of the queue; call once the step's losses have been computed."""
        start = int(self.queue_position)
        # The loss's backward pass still needs the queue it saw, so the new one is another tensor.
        queue = self.queue.clone()
        queue[start : start + len(key)] = key
        self.queue = queue
        self.queue_position.fill_((start + len(key)) % self.recipe.queue_size)
