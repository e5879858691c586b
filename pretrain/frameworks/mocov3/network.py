"""The network and the loss of MoCo v3 in its form for ConvNets (arXiv:2104.02057, algorithm 1)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.collectives import gather
from mixmask.engine.distributed import world
from mixmask.engine.heads import mlp
from mixmask.pretrain.frameworks.mocov3 import MoCoV3Recipe
from mixmask.pretrain.network import Clean, Encoder, Framework, Views, cosine_momentum, move_average, unit


class MoCoV3(Framework):
    """Encoder with projector and predictor, and its moving average for the keys."""

    recordable = True

    def __init__(self, recipe: MoCoV3Recipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        trunk = build_trunk(backbone)
        hidden = recipe.projector_width
        self.encoder = Encoder(
            trunk, mlp([width_of(trunk), hidden, recipe.dim], norm=True, last_norm=True, last_affine=False)
        )
        self.predictor = mlp([recipe.dim, hidden, recipe.dim], norm=True, last_bias=False)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    @property
    @override
    def slow(self) -> Encoder:
        return self.momentum_encoder

    @override
    def query(self, images: Tensor) -> Tensor:
        return unit(self.predictor(self.encoder(images)).float())

    @torch.no_grad()
    def key(self, images: Tensor) -> Tensor:
        """(N, dim) unit vectors without gradient."""
        return unit(self.momentum_encoder(images))

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """4τ times the cross-entropy of each query's own key among the keys of all ranks (algorithm 1, ``ctr``).

        The paper adds both directions, each 2τ times the cross-entropy. The clean loss is the mean of two of these values,
        which is the same sum, so that the loss of one query has the scale of the clean loss.
        """
        return 4 * self.recipe.temperature * self._contrast(query, key)[0]

    def _contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) cross-entropies, and (N,) whether the own key is the nearest."""
        with torch.autocast(query.device.type, enabled=False):
            logits = query @ gather(key).T / self.recipe.temperature
            own = world().rank * len(query) + torch.arange(len(query), device=query.device)
            positive = logits.gather(1, own[:, None])[:, 0]
            return torch.logsumexp(logits, dim=1) - positive, logits.detach().argmax(dim=1) == own

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """Each view is the query once and the key once."""
        first, second = self.query(queries[0]), self.query(queries[1])
        key_first, key_second = self.key(keys[0]), self.key(keys[1])
        losses = (self.loss(first, key_second) + self.loss(second, key_first)) / 2
        nearest = self._contrast(first.detach(), key_second)[1]
        return Clean(losses, first, (key_second,), {"contrast_accuracy": 100 * nearest.float().mean()})

    def after_step(self, progress: float) -> None:
        """Move the momentum encoder towards the encoder.

        The published code does this before the keys are computed. In the first step both are equal, so the keys are the
        same.
        """
        move_average(self.momentum_encoder, self.encoder, cosine_momentum(self.recipe.momentum, progress))
