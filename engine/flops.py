"""How much arithmetic a network does, and how many parameters it has."""

from __future__ import annotations

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from mixmask.engine.backbones import BackboneRecipe, build_trunk


@cache
def _counts(arch: str, stem: str, channels: int, height: int, width: int) -> tuple[int, int]:
    with torch.device("meta"):
        trunk = build_trunk(BackboneRecipe.model_validate({"arch": arch, "stem": stem, "in_channels": channels})).eval()
        images = torch.empty(1, channels, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trunk(images)
    return int(counter.get_total_flops()), sum(parameter.numel() for parameter in trunk.parameters())


def forward_flops(backbone: BackboneRecipe, height: int, width: int | None = None) -> int:
    """Floating-point operations (a multiplication and an addition are two) of an image's way through a trunk."""
    return _counts(backbone.arch, backbone.stem, backbone.in_channels, height, width or height)[0]


def num_parameters(backbone: BackboneRecipe) -> int:
    """Parameters of a trunk."""
    return _counts(backbone.arch, backbone.stem, backbone.in_channels, 64, 64)[1]
