"""The network and the loss of BYOL (arXiv:2006.07733)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.heads import mlp
from mixmask.pretrain.frameworks.byol import BYOLRecipe
from mixmask.pretrain.network import Clean, Encoder, Framework, Views, cosine_momentum, move_average, unit


class BYOL(Framework):
    """Online encoder with a predictor, and the target encoder, which is the moving average of the online encoder."""

    recordable = True

    def __init__(self, recipe: BYOLRecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        trunk = build_trunk(backbone)
        hidden = [recipe.projector_width] * (recipe.projector_layers - 1)
        self.online = Encoder(trunk, mlp([width_of(trunk), *hidden, recipe.dim], norm=True))
        self.predictor = mlp([recipe.dim, *hidden, recipe.dim], norm=True)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @property
    @override
    def fast(self) -> Encoder:
        return self.online

    @property
    @override
    def slow(self) -> Encoder:
        return self.target

    def query(self, images: Tensor) -> Tensor:
        """The predictor's output, (N, dim) unit vectors."""
        return unit(self.predictor(self.online(images)).float())

    @torch.no_grad()
    def key(self, images: Tensor) -> Tensor:
        """The target's projection, (N, dim) unit vectors without gradient."""
        return unit(self.target(images))

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """Twice the squared distance of unit vectors (arXiv:2006.07733, equation 2), 4 - 4 · cos, in [0, 8].

        The paper adds the squared distances of both directions. The clean loss is the mean of two of these values,
        which is the same sum. So the loss of one query has the scale of the clean loss, as in the other frameworks.
        """
        return 4 - 4 * (query * key).sum(dim=1)

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """The squared distances of both directions, added (section 3.1, "we symmetrize the loss")."""
        first, second = self.query(queries[0]), self.query(queries[1])
        key_first, key_second = self.key(keys[0]), self.key(keys[1])
        losses = (self.loss(first, key_second) + self.loss(second, key_first)) / 2
        # A mixture of the first view is compared with the key of the second.
        return Clean(losses, first, (key_second,))

    def after_step(self, progress: float) -> None:
        """Move the target towards the online encoder."""
        move_average(self.target, self.online, cosine_momentum(self.recipe.momentum, progress))
