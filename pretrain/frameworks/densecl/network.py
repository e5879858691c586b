"""The network and the loss of DenseCL (arXiv:2011.09157)."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, channels_of, map_and_features
from mixmask.pretrain.frameworks.densecl import DenseCLRecipe
from mixmask.pretrain.frameworks.moco.network import MoCo, info_nce
from mixmask.pretrain.network import Clean, Encoder, Views, move_average, unit


class DenseCL(MoCo):
    """MoCo with a second head of 1×1 convolutions.

    A query or key is one row of (N, 2 dim + S dim + S C) numbers for S places and C channels of the trunk: the global
    embedding, the mean of the dense ones, the dense ones, and the trunk's map. All are unit vectors. The loss of an image
    is a mean over its places. So a mixed image has a loss of its own, over all its places, and the mixed loss is the
    usual mean, weighted by area: equation 6 to the letter.
    """

    def __init__(self, recipe: DenseCLRecipe, backbone: BackboneRecipe) -> None:
        super().__init__(recipe, backbone)
        self.dense_weight = recipe.dense_weight
        self.width = _channels(self.trunk)
        self.dense_projector = nn.Sequential(
            nn.Conv2d(self.width, self.width, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(self.width, recipe.dim, kernel_size=1),
        )
        self.dense_key_projector = copy.deepcopy(self.dense_projector).requires_grad_(False)

    @override
    def first_negatives(self) -> Tensor:
        return torch.cat([super().first_negatives(), super().first_negatives()], dim=1)

    @override
    def query(self, images: Tensor) -> Tensor:
        return _encode(self.query_encoder, self.dense_projector, images)

    @override
    def answer(self, images: Tensor) -> Tensor:
        return _encode(self.key_encoder, self.dense_key_projector, images)

    @override
    def negative(self, key: Tensor) -> Tensor:
        """The global embedding, and the mean of the dense ones."""
        return key[:, : 2 * self.recipe.dim]

    @override
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - λ) times MoCo's loss and λ times the dense one (equation 3), and whether the global positive is nearest.

        The positive of a place is the place of the key whose trunk features are most similar (equation 4).
        """
        dim, temperature = self.recipe.dim, self.recipe.temperature
        asked, asked_map = self._places(query)
        answered, answered_map = self._places(key)
        with torch.autocast(query.device.type, enabled=False):
            partner = (asked_map.mT @ answered_map).argmax(dim=2)  # (N, S)
            matched = answered.gather(2, partner[:, None].expand(-1, dim, -1))
        losses, first = info_nce(query[:, :dim], key[:, :dim], self.queue[:, :dim], temperature)
        every, partners = asked.mT.flatten(0, 1), matched.mT.flatten(0, 1)
        dense, _ = info_nce(every, partners, self.queue[:, dim:], temperature)
        return (1 - self.dense_weight) * losses + self.dense_weight * dense.view(len(query), -1).mean(dim=1), first

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(N, dim, S) dense embeddings and (N, C, S) trunk features."""
        dim = self.recipe.dim
        places = (rows.shape[1] - 2 * dim) // (dim + self.width)
        dense, features = torch.split(rows[:, 2 * dim :], [dim * places, self.width * places], dim=1)
        return dense.view(len(rows), dim, places), features.view(len(rows), self.width, places)

    @override
    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        clean = super().forward_views(queries, keys, rng)
        dim = self.recipe.dim
        return replace(clean, query=clean.query[:, :dim], partner=clean.keys[0][:, :dim])

    @override
    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        move_average(self.dense_key_projector, self.dense_projector, self.recipe.momentum)


def _channels(trunk: nn.Module) -> int:
    """Channels of the trunk's last map."""
    was_training = trunk.training
    with torch.no_grad():
        images = torch.zeros(1, channels_of(trunk), 64, 64, device=next(trunk.parameters()).device)
        channels = map_and_features(trunk.eval(), images)[0].shape[1]
    trunk.train(was_training)
    return channels


def _encode(encoder: Encoder, dense_projector: nn.Module, images: Tensor) -> Tensor:
    last, features = map_and_features(encoder.trunk, images)
    dense = dense_projector(last).float()
    parts = (
        unit(encoder.projector(features).float()),
        unit(dense.mean(dim=(2, 3))),
        unit(dense.flatten(2)).flatten(1),
        unit(last.detach().float().flatten(2)).flatten(1),  # it only says which places belong together
    )
    return torch.cat(parts, dim=1)
