"""Frameworks of seconds, embeddings, and the slow loss that several tests share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.framework import FrameworkRecipe
from mixmask.pretrain.frameworks.barlow_twins import BarlowTwinsRecipe
from mixmask.pretrain.frameworks.byol import BYOLRecipe
from mixmask.pretrain.frameworks.densecl import DenseCLRecipe
from mixmask.pretrain.frameworks.dino import DINORecipe
from mixmask.pretrain.frameworks.moco import MoCoRecipe
from mixmask.pretrain.frameworks.mocov3 import MoCoV3Recipe
from mixmask.pretrain.frameworks.simclr import SimCLRRecipe
from mixmask.pretrain.frameworks.simsiam import SimSiamRecipe
from mixmask.pretrain.frameworks.swav import SwAVRecipe
from mixmask.pretrain.frameworks.vicreg import VICRegRecipe
from mixmask.pretrain.network import Framework

MOCO = MoCoRecipe(kind="mocov2", dim=8, queue_size=16, momentum=0.9, temperature=0.2, bn_splits=2)
RECIPES: dict[str, FrameworkRecipe] = {
    "moco": MOCO,
    "simclr": SimCLRRecipe(dim=8, projector_width=16, temperature=0.3),
    "byol": BYOLRecipe(dim=8, projector_width=16, momentum=0.9),
    "simsiam": SimSiamRecipe(dim=8, projector_layers=2),
    "mocov3": MoCoV3Recipe(dim=8, projector_width=16, momentum=0.9, temperature=0.3),
    "swav": SwAVRecipe(dim=8, projector_width=16, prototypes=12, num_small=2, small_crop=8, queue_size=8),
    "dino": DINORecipe(dim=8, projector_width=16, outputs=12, momentum=0.9, num_small=2, small_crop=8),
    "densecl": DenseCLRecipe(dim=8, queue_size=16, momentum=0.9, temperature=0.2, bn_splits=2, dense_weight=0.4),
    "barlowtwins": BarlowTwinsRecipe(dim=8, projector_width=16),
    "vicreg": VICRegRecipe(dim=8, projector_width=16),
}
BACKBONE = BackboneRecipe(arch="resnet18", stem="cifar")


def build(name: str) -> Framework:
    torch.manual_seed(0)
    return RECIPES[name].build(BACKBONE)


def rows(num: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def slow_info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> list[float]:
    """Equation 1 of the MoCo paper."""
    losses = []
    for q, k in zip(query, key):
        positive = math.exp(dot(q, k) / temperature)
        total = positive + sum(math.exp(dot(q, other) / temperature) for other in queue)
        losses.append(-math.log(positive / total))
    return losses


def embeddings(num: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num, 8, generator=rng, dtype=torch.float64) * torch.rand(8, generator=rng, dtype=torch.float64)
