"""The network and the loss of SimSiam (arXiv:2011.10566)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.heads import mlp
from mixmask.pretrain.frameworks.simsiam import SimSiamRecipe
from mixmask.pretrain.network import Clean, Encoder, Framework, Views, unit


class SimSiam(Framework):
    """One encoder for both views, and a predictor on the query side."""

    recordable = True

    def __init__(self, recipe: SimSiamRecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        trunk = build_trunk(backbone)
        width = width_of(trunk)
        hidden = [width] * (recipe.projector_layers - 1)
        self.encoder = Encoder(trunk, mlp([width, *hidden, recipe.dim], norm=True, last_norm=True, last_affine=False))
        bottleneck = recipe.predictor_width or recipe.dim // 4
        self.predictor = mlp([recipe.dim, bottleneck, recipe.dim], norm=True)

    @override
    def fixed_rate_parameters(self) -> Iterable[nn.Parameter]:
        return self.predictor.parameters() if self.recipe.fixed_predictor_lr else ()

    def query(self, images: Tensor) -> Tensor:
        """The predictor's output, (N, dim) unit vectors."""
        return self._predict(self.encoder(images))

    def _predict(self, embedding: Tensor) -> Tensor:
        return unit(self.predictor(embedding).float())

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """Negative cosine similarity (arXiv:2011.10566, equation 1), in [-1, 1]; the key has no gradient."""
        return -(query * key.detach()).sum(dim=1)

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """The mean of both directions (equation 2)."""
        asked = [self.encoder(view) for view in queries]
        # One forward pass serves both sides, unless a mixture erased parts of the queries.
        answered = asked
        if keys[0] is not queries[0]:
            with torch.no_grad():
                answered = [self.encoder(view) for view in keys]
        first, second = (self._predict(embedding) for embedding in asked)
        key_first, key_second = (unit(embedding.detach()) for embedding in answered)
        losses = (self.loss(first, key_second) + self.loss(second, key_first)) / 2
        # A mixture of the first view is compared with the key of the second.
        return Clean(losses, first, (key_second,))
