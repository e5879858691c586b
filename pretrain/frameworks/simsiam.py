"""SimSiam (arXiv:2011.10566)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.heads import mlp
from mixmask.pretrain.framework import MAX_WIDTH, Clean, Encoder, Framework, FrameworkRecipe, Views, unit


class SimSiamRecipe(FrameworkRecipe):
    """Two views, a predictor and a stop-gradient, without negatives or a momentum encoder.

    The projector's hidden layers have the trunk's width, and its last BatchNorm has no weight and bias. The predictor's
    hidden layer is a bottleneck of ``dim`` / 4 (section 3 of the paper). ``fixed_predictor_lr`` keeps the predictor's
    learning rate constant (table 1c of the paper).
    """

    kind: Literal["simsiam"] = "simsiam"
    dim: int = Field(2048, ge=4, le=MAX_WIDTH)
    projector_layers: int = Field(3, ge=1, le=10)
    predictor_width: int | None = Field(
        None, ge=1, le=MAX_WIDTH, description="the bottleneck; null takes a quarter of dim"
    )
    fixed_predictor_lr: bool = True

    @override
    def full_passes(self, hidden: bool) -> tuple[int, int]:
        return 2, 2 * hidden

    @override
    def build(self, backbone: BackboneRecipe) -> SimSiam:
        return SimSiam(self, backbone)


class SimSiam(Framework):
    """One encoder for both views, and a predictor on the query side."""

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
