"""How much arithmetic a network does, and how many parameters it has.

For ResNets this follows from their layers, without building them, so that a dry run needs no torch. Any other network
is built without its weights and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from mixmask.engine.backbones import RESNETS, BackboneRecipe, build_trunk
from mixmask.engine.late import torch

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
WIDE = ("resnet50", "resnet101")  # of bottlenecks, whose last convolution has four times the channels
assert (*BLOCKS,) == RESNETS


class Convolution(NamedTuple):
    """A convolution followed by batch normalisation; its output is ``height`` × ``width``."""

    kernel: int
    inputs: int
    outputs: int
    height: int
    width: int


def convolutions(backbone: BackboneRecipe, height: int, width: int) -> Iterator[Convolution]:
    """The convolutions of a ResNet (torchvision's: bottlenecks have the stride in the 3×3 convolution).

    Args:
        backbone: One of `RESNETS`.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
    """
    if backbone.stem == "cifar":
        yield Convolution(3, backbone.in_channels, 64, height, width)
    else:
        height, width = _half(height), _half(width)
        yield Convolution(7, backbone.in_channels, 64, height, width)
        height, width = _half(height), _half(width)  # the max-pooling
    inputs = 64
    for stage, blocks in enumerate(BLOCKS[backbone.arch]):
        planes = 64 << stage
        outputs = planes * (4 if backbone.arch in WIDE else 1)
        for block in range(blocks):
            before = height, width
            halves = stage > 0 and block == 0
            if halves:
                height, width = _half(height), _half(width)
            if backbone.arch in WIDE:
                yield Convolution(1, inputs, planes, *before)
                yield Convolution(3, planes, planes, height, width)
                yield Convolution(1, planes, outputs, height, width)
            else:
                yield Convolution(3, inputs, planes, height, width)
                yield Convolution(3, planes, planes, height, width)
            if halves or inputs != outputs:
                yield Convolution(1, inputs, outputs, height, width)  # the shortcut
            inputs = outputs


def _half(side: int) -> int:
    return (side + 1) // 2


@cache
def _counts(arch: str, stem: str, channels: int, height: int, width: int) -> tuple[int, int]:
    """Operations and parameters."""
    backbone = BackboneRecipe.model_validate({"arch": arch, "stem": stem, "in_channels": channels})
    if arch not in RESNETS:
        return count(backbone, height, width)
    layers = [*convolutions(backbone, height, width)]
    weights = [one.kernel**2 * one.inputs * one.outputs for one in layers]
    flops = sum(2 * each * one.height * one.width for each, one in zip(weights, layers, strict=True))
    return flops, sum(weights) + sum(2 * one.outputs for one in layers)


def count(backbone: BackboneRecipe, height: int, width: int) -> tuple[int, int]:
    """Operations of the forward pass of an image, and parameters, counted in the network itself."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        trunk = build_trunk(backbone).eval()
        images = torch.empty(1, backbone.in_channels, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trunk(images)
    return int(counter.get_total_flops()), sum(parameter.numel() for parameter in trunk.parameters())


def forward_flops(backbone: BackboneRecipe, height: int, width: int | None = None) -> int:
    """Floating-point operations (a multiplication and an addition are two) of an image's way through a trunk."""
    return _counts(backbone.arch, backbone.stem, backbone.in_channels, height, width or height)[0]


def num_parameters(backbone: BackboneRecipe) -> int:
    """Parameters of a trunk."""
    return _counts(backbone.arch, backbone.stem, backbone.in_channels, 64, 64)[1]
