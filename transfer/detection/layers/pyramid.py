"""The maps of a trunk, a feature pyramid on them, and pooling from its levels (FPN, arXiv:1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from typing_extensions import override

from mixmask.engine.backbones import TIMM, BackboneRecipe, build_trunk
from mixmask.engine.errors import ConfigError

STRIDES = (4, 8, 16, 32)  # of a trunk's maps; a pyramid adds coarser ones
CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4  # a box of 224² pixels is pooled from the map of stride 2⁴ (section 4.2)


class TrunkMaps(nn.Module):
    """The maps of a trunk at the strides 4, 8, 16 and 32.

    Attributes:
        channels: The channels of each map.
        bottlenecks: Whether the trunk is a ResNet of bottlenecks.
    """

    channels: tuple[int, ...]
    bottlenecks: bool

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W), with sides that are multiples of 32, to (N, C, H/4, W/4) … (N, C, H/32, W/32)."""
        raise NotImplementedError


class ResNetMaps(TrunkMaps):
    """The four stages of one of torchvision's ResNets."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool)
        self.res2, self.res3, self.res4, self.res5 = trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4
        width = trunk.num_features
        self.channels = (width // 8, width // 4, width // 2, width)
        self.bottlenecks = hasattr(self.res2[0], "conv3")

    @override
    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in (self.res2, self.res3, self.res4, self.res5):
            maps.append(stage(maps[-1]))
        return maps[1:]


class TimmMaps(TrunkMaps):
    """The maps of a timm ConvNet, where its ``feature_info`` says that they have these strides.

    What comes after the last map, such as a final normalisation, is taken off: it would get no gradient.
    """

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        places = places_of(trunk)
        info = [trunk.feature_info[place] for place in places]
        trunk.prune_intermediate_layers(places, prune_norm=True, prune_head=True)
        self.trunk, self.places = trunk, places
        self.channels = tuple(stage["num_chs"] for stage in info)
        self.bottlenecks = False

    @override
    def forward(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.trunk.forward_intermediates(images, indices=self.places, intermediates_only=True)
        return maps


def places_of(trunk: Any) -> list[int]:
    """The places in ``feature_info`` of a timm trunk of the maps with strides 4, 8, 16 and 32; fewer if some are lacking."""
    strides = [stage["reduction"] for stage in getattr(trunk, "feature_info", [])]
    # The last of several maps of one stride is the deepest.
    return [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES if stride in strides]


def check_maps(backbone: BackboneRecipe, what: str) -> None:
    """Refuse a trunk that has no maps of strides 4, 8, 16 and 32.

    Args:
        backbone: The trunk's architecture.
        what: What needs the maps, for the message.

    Raises:
        ConfigError: The message says which trunks are valid.
    """
    if backbone.stem != "standard":
        raise ConfigError(
            f"{what} needs a trunk with the standard stem (maps of strides 4, 8, 16, 32); this one has the CIFAR stem"
        )
    if not backbone.arch.startswith(TIMM):
        return
    with torch.device("meta"):  # shapes only: no memory, no weights
        trunk: Any = build_trunk(backbone)
        places = places_of(trunk)
        fits = len(places) == len(STRIDES) and hasattr(trunk, "forward_intermediates")
        if fits:
            maps = trunk.forward_intermediates(torch.empty(1, 3, 64, 96), indices=places, intermediates_only=True)
            wanted = [(64 // stride, 96 // stride) for stride in STRIDES]
            fits = [tuple(one.shape[2:]) for one in maps] == wanted
    if not fits:
        raise ConfigError(
            f"{what} needs a trunk with maps of strides 4, 8, 16 and 32: {backbone.arch} has none; ResNets, "
            f"timm/convnext_tiny, timm/regnety_016 and the like have them"
        )


def trunk_maps(backbone: BackboneRecipe, state: dict[str, Tensor]) -> TrunkMaps:
    """The maps of a trunk that `check_maps` accepts, with its weights loaded strictly."""
    trunk = build_trunk(backbone)
    trunk.load_state_dict(state, strict=True)
    return TimmMaps(trunk) if backbone.arch.startswith(TIMM) else ResNetMaps(trunk)


class Pyramid(nn.Module):
    """torchvision's feature pyramid on a trunk's maps; with the same weights it equals Detectron2's.

    Both take nearest neighbours from the coarser map. Detectron2 doubles it, torchvision fits it to the finer one: the same,
    since images are padded to multiples of 32.

    Args:
        maps: The trunk.
        levels: How many of its maps are used, from the coarsest: 4 for FPN, 3 for RetinaNet.
        channels: Channels of the pyramid's maps.
        norm: Whether its convolutions have batch normalisation, instead of biases.
        extra: What adds coarser maps.
    """

    def __init__(self, maps: TrunkMaps, levels: int, channels: int, norm: bool, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.trunk, self.levels = maps, levels
        norm_layer = nn.BatchNorm2d if norm else None
        self.fpn = FeaturePyramidNetwork(list(maps.channels[-levels:]), channels, extra, norm_layer)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) to (N, C, ·, ·) maps, the finest first."""
        maps = {str(number): one for number, one in enumerate(self.trunk(images)[-self.levels :])}
        return [*self.fpn(maps).values()]


def pool_from_levels(maps: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
    """Pool each box from the map that fits its size (FPN, equation 1): (R, C, ``size``, ``size``).

    torchvision's ``MultiScaleRoIAlign`` would not do: it has no ``aligned`` sampling, which Detectron2 uses.

    Args:
        maps: (N, C, ·, ·) of the strides 4, 8, 16 and 32.
        boxes: The (·, 4) boxes of each image.
        size: The resolution.
    """
    every = torch.cat(list(boxes))
    image = torch.repeat_interleave(
        torch.arange(len(boxes), device=every.device), torch.tensor([len(own) for own in boxes], device=every.device)
    )
    rois = torch.cat([image[:, None].to(every.dtype), every], dim=1)
    side = ((every[:, 2] - every[:, 0]) * (every[:, 3] - every[:, 1])).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE + 1e-8)).clamp(2, 5).long() - 2
    pooled = torch.zeros(len(every), maps[0].shape[1], size, size, device=every.device)
    for number, (one, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        own = (level == number).nonzero().flatten()
        pooled[own] = roi_align(one.float(), rois[own], size, 1.0 / stride, sampling_ratio=0, aligned=True)
    if maps[0].is_contiguous(memory_format=torch.channels_last):  # RoIAlign's output never is
        pooled = pooled.contiguous(memory_format=torch.channels_last)
    return pooled
