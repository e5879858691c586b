"""The network and the loss of DINO for ConvNets (arXiv:2104.14294)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk, width_of
from mixmask.engine.collectives import gather
from mixmask.engine.heads import Head, mlp
from mixmask.engine.host_values import from_host
from mixmask.pretrain.frameworks.dino import DINORecipe
from mixmask.pretrain.multi_crop import cross_entropy, of_each_view, over_pairs
from mixmask.pretrain.network import Clean, Encoder, Framework, Views, cosine_momentum, move_average, unit


class DINOEncoder(Encoder):
    """Trunk, head, and prototypes; images to (N, outputs) cosines."""

    def __init__(self, trunk: nn.Module, projector: Head, outputs: int) -> None:
        super().__init__(trunk, projector)
        self.prototypes = nn.Linear(projector.info.widths[-1], outputs, bias=False)

    def cosines(self, embedding: Tensor) -> Tensor:
        """(N, dim) embeddings to their cosines with the prototypes."""
        with torch.autocast(embedding.device.type, enabled=False):
            return F.linear(unit(embedding), F.normalize(self.prototypes.weight, dim=1))


class DINO(Framework):
    """Student and teacher.

    A query is the student's (N, outputs) cosines, a key the teacher's distribution of a clean image. The centre is made of
    clean images only. So a mixed query has a loss of its own against each of its images, and the mixed loss is the usual
    mean, weighted by area.
    """

    center: Tensor

    recordable = True

    def __init__(self, recipe: DINORecipe, backbone: BackboneRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        trunk = build_trunk(backbone)
        hidden = [recipe.projector_width] * (recipe.projector_layers - 1)
        head = mlp([width_of(trunk), *hidden, recipe.dim], norm=recipe.projector_norm, activation="gelu")
        self.student = DINOEncoder(trunk, head, recipe.outputs)
        for layer in head:
            if isinstance(layer, nn.Linear):  # as in the published code
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(recipe.outputs))

    @property
    @override
    def fast(self) -> Encoder:
        return self.student

    @property
    @override
    def slow(self) -> Encoder:
        return self.teacher

    @override
    def query(self, images: Tensor) -> Tensor:
        return self.student.cosines(self.student(images))

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """Cross-entropy of the student with the teacher's distribution (equation 2)."""
        return cross_entropy(query, key, self.recipe.temperature)

    def teacher_temperature(self, progress: float) -> float:
        """The teacher's temperature after a share of the run."""
        recipe = self.recipe
        share = min(progress / recipe.teacher_warmup, 1.0) if recipe.teacher_warmup else 1.0
        return recipe.warmup_teacher_temperature + share * (
            recipe.teacher_temperature - recipe.warmup_teacher_temperature
        )

    def forward_views(self, queries: Views, keys: Views, rng: torch.Generator) -> Clean:
        """The mean over all pairs of a full view for the teacher and another view for the student (equation 3)."""
        asked = of_each_view(self.student, queries)
        predictions = [self.student.cosines(one) for one in asked]
        with torch.no_grad():
            answered = of_each_view(self.teacher, keys)
            outputs = [self.teacher.cosines(one) for one in answered]
            temperature = from_host(lambda: torch.tensor(self.teacher_temperature(self.progress)), self.center.device)
            wanted = [((one - self.center) / temperature).softmax(dim=1) for one in outputs]
            if self.training:  # means over all ranks
                self.fresh.append(torch.stack([gather(one).mean(dim=0) for one in outputs]).mean(dim=0))
        losses = over_pairs(self.loss, predictions, wanted)
        # A mixture of the first view is compared with the teacher's answer to the second.
        return Clean(losses, asked[0], (wanted[1],), partner=answered[1])

    @override
    def before_step(self) -> None:
        if self.progress < self.recipe.freeze_prototypes:
            self.student.prototypes.weight.grad = None

    @override
    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the centre (equation 4) and the teacher."""
        if self.fresh:
            self.center.lerp_(torch.stack(self.fresh).mean(dim=0), 1 - self.recipe.center_momentum)
            self.fresh.clear()
        move_average(self.teacher, self.student, cosine_momentum(self.recipe.momentum, progress))
