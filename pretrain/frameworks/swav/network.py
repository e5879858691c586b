"""The network and the loss of SwAV (arXiv:2006.09882)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.collectives import gather
from mixmask.engine.distributed import world
from mixmask.engine.heads import mlp
from mixmask.pretrain.frameworks.swav import SwAVRecipe
from mixmask.pretrain.multi_crop import cross_entropy, of_each_view, over_pairs
from mixmask.pretrain.network import Clean, Encoder, Framework, Views, unit


class SwAV(Framework):
    """One encoder, and prototypes of unit length.

    A query is its (N, prototypes) similarities, a key its code. Codes are made of clean images only, all at once: they are
    the key side of equation 6. A mixed query then has a loss of its own against the code of each of its images, so the mixed
    loss is the usual mean, weighted by area.
    """

    queue: Tensor

    recordable = True

    def __init__(self, recipe: SwAVRecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        trunk = build_trunk(backbone)
        self.encoder = Encoder(trunk, mlp([width_of(trunk), recipe.projector_width, recipe.dim], norm=True))
        self.prototypes = nn.Linear(recipe.dim, recipe.prototypes, bias=False)
        self._to_unit_length()
        self.register_buffer("queue", torch.zeros(2, recipe.queue_size, recipe.dim))
        self.filled = (
            0  # rows of the queue that hold embeddings; not a buffer, because reading one would wait for the GPU
        )

    @property
    @override
    def phase(self) -> bool:
        """Whether the codes are made with the queue."""
        return self.recipe.queue_size > 0 and self.filled >= self.recipe.queue_size

    @override
    def get_extra_state(self) -> int:
        return self.filled

    @override
    def set_extra_state(self, state: int) -> None:
        self.filled = state

    @override
    def query(self, images: Tensor) -> Tensor:
        return self._similarity(unit(self.encoder(images)))

    def _similarity(self, embedding: Tensor) -> Tensor:
        with torch.autocast(embedding.device.type, enabled=False):
            return F.linear(embedding, self.prototypes.weight)

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """Cross-entropy of the prediction softmax(similarity / temperature) with the code (equation 2)."""
        return cross_entropy(query, key, self.recipe.temperature)

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """Swapped prediction (equation 1), a mean over all pairs of a full view and another view."""
        asked = [unit(one) for one in of_each_view(self.encoder, queries)]
        answered = asked[:2]
        if keys[0] is not queries[0]:
            with torch.no_grad():
                answered = [unit(one) for one in of_each_view(self.encoder, keys)]
        predictions = [self._similarity(one) for one in asked]
        codes = self._codes([one.detach() for one in answered])
        losses = over_pairs(self.loss, predictions, codes)
        # A mixture of the first view is compared with the code of the second.
        return Clean(losses, asked[0], (codes[1],), partner=answered[1].detach())

    @torch.no_grad()
    def _codes(self, answered: Sequence[Tensor]) -> list[Tensor]:
        """The codes of this rank's rows, made from the rows of all ranks and the queue."""
        everyone = torch.stack([gather(one) for one in answered])
        if self.training and self.recipe.queue_size:
            self.fresh.append(everyone)  # (2, n, dim); they enter the queue in `after_step`
        codes = []
        for number, rows in enumerate(everyone):
            earlier = self.queue[number] if self.phase else rows[:0]
            assigned = sinkhorn(
                self._similarity(torch.cat([earlier, rows])), self.recipe.epsilon, self.recipe.sinkhorn_iterations
            )
            own = assigned[len(earlier) :]
            codes.append(own[world().share(len(own))])
        return codes

    @override
    def before_step(self) -> None:
        if self.progress < self.recipe.freeze_prototypes:
            self.prototypes.weight.grad = None

    @override
    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Bring the prototypes to unit length, and put the newest embeddings into the queue."""
        self._to_unit_length()
        if self.fresh and progress > self.recipe.queue_starts:
            size = self.recipe.queue_size
            self.queue.copy_(torch.cat([*reversed(self.fresh), self.queue], dim=1)[:, :size])
            self.filled = min(self.filled + sum(one.shape[1] for one in self.fresh), size)
        self.fresh.clear()

    @torch.no_grad()
    def _to_unit_length(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


def sinkhorn(similarity: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The codes of a batch: assignments that use all prototypes equally (equations 3 to 5, Sinkhorn-Knopp).

    Args:
        similarity: (B, K) of images and prototypes.
        epsilon: How soft the assignments are.
        iterations: Of the normalisation of rows and columns.

    Returns:
        (B, K); each row has the sum 1.
    """
    codes = ((similarity - similarity.max()) / epsilon).exp()
    codes = codes / codes.sum()
    num, prototypes = codes.shape
    for _ in range(iterations):
        codes = codes / codes.sum(dim=0, keepdim=True).clamp(min=1e-30) / prototypes
        codes = codes / codes.sum(dim=1, keepdim=True).clamp(min=1e-30) / num
    return codes * num
