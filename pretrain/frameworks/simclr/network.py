"""The network and the loss of SimCLR (arXiv:2002.05709)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.differentiable import gather_with_gradient
from mixmask.engine.distributed import world
from mixmask.engine.heads import mlp
from mixmask.pretrain.frameworks.simclr import SimCLRRecipe
from mixmask.pretrain.network import Clean, Encoder, Framework, Views, unit


class SimCLR(Framework):
    """One encoder for both views; every embedding has a gradient."""

    keys_have_gradient = True
    asks_with_both_views = False

    recordable = True

    def __init__(self, recipe: SimCLRRecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        trunk = build_trunk(backbone)
        width = width_of(trunk)
        hidden = [recipe.projector_width or width] * (recipe.projector_layers - 1)
        self.encoder = Encoder(trunk, mlp([width, *hidden, recipe.dim], norm=True, last_norm=True))

    @override
    def query(self, images: Tensor) -> Tensor:
        return unit(self.encoder(images))

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """NT-Xent with the queries as anchors (arXiv:2002.05709, equation 1).

        An anchor's negatives are the keys and the queries of all other images. The mean of `loss(a, b)` and `loss(b, a)`
        over the batch is the paper's loss of the 2N views.
        """
        logits = self._logits(query, key)
        return torch.logsumexp(logits, dim=1) - logits.gather(1, self._own(query))[:, 0]

    def _own(self, query: Tensor) -> Tensor:
        """(N, 1) column of each query's own key among the keys of all ranks."""
        first = world().rank * len(query)
        return torch.arange(first, first + len(query), device=query.device)[:, None]

    def _logits(self, query: Tensor, key: Tensor) -> Tensor:
        """(N, 2M) logits against the keys and the queries of all M images of all ranks; -inf for the query itself."""
        with torch.autocast(query.device.type, enabled=False):
            # Every embedding is trained as anchor and as negative, so its gradient flows back to the rank that made it.
            with_keys = query @ gather_with_gradient(key).T
            with_queries = query @ gather_with_gradient(query).T
            # An anchor is not a negative of itself.
            with_queries = with_queries.scatter(1, self._own(query), -torch.inf)
            return torch.cat([with_keys, with_queries], dim=1) / self.recipe.temperature

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """Each view is the anchor once: the mean of both directions."""
        query, key = self.query(queries[0]), self.query(keys[1])
        losses = (self.loss(query, key) + self.loss(key, query)) / 2
        with torch.no_grad():
            first = (self._logits(query, key).argmax(dim=1) == self._own(query)[:, 0]).float().mean()
        return Clean(losses, query, (key,), {"contrast_accuracy": 100 * first})
