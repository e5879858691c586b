"""A fully convolutional network: a trunk whose last strides are dilations, and FCN heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.backbones import TIMM, BackboneRecipe, build_trunk
from mixmask.engine.errors import ConfigError
from mixmask.transfer.segmentation.recipe import AuxiliaryRecipe, HeadRecipe


class DilatedResNet(nn.Module):
    """One of torchvision's ResNets with output stride 8 or 16: the strides of its last stages become dilations.

    The first block of such a stage has the dilation of the stage before, as in torchvision's and mmsegmentation's.
    """

    def __init__(self, trunk: Any, output_stride: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool)
        self.res2, self.res3, self.res4, self.res5 = trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4
        self.channels = (trunk.num_features // 2, trunk.num_features)
        dilation = 1
        for stage in (self.res4, self.res5) if output_stride == 8 else (self.res5,):
            for number, block in enumerate(stage):
                dilate(block, dilation if number == 0 else 2 * dilation)
            dilation *= 2

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) to the maps of the last two stages."""
        features = self.res3(self.res2(self.stem(images)))
        before = self.res4(features)
        return before, self.res5(before)


def dilate(block: nn.Module, dilation: int) -> None:
    """Give the 3×3 convolutions of a residual block a dilation, and all of its convolutions stride 1, in place."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


class DilatedTimm(nn.Module):
    """The last two maps of different stages of a timm ConvNet, built with an output stride of 8 or 16."""

    def __init__(self, arch: str, output_stride: int) -> None:
        super().__init__()
        import timm

        trunk: Any = timm.create_model(
            arch.removeprefix(TIMM), pretrained=False, num_classes=0, output_stride=output_stride
        )
        self.places = [len(trunk.feature_info) - 2, len(trunk.feature_info) - 1]
        self.channels = tuple(trunk.feature_info[place]["num_chs"] for place in self.places)
        self.trunk = trunk

    def load(self, state: dict[str, Tensor]) -> None:
        """Load the trunk strictly, then take off what comes after the last map and would get no gradient."""
        self.trunk.load_state_dict(state, strict=True)
        self.trunk.prune_intermediate_layers(self.places, prune_norm=True, prune_head=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) to the maps of the last two stages."""
        before, last = self.trunk.forward_intermediates(images, indices=self.places, intermediates_only=True)
        return before, last


def check_backbone(backbone: BackboneRecipe, output_stride: int) -> None:
    """Refuse a trunk that cannot be given the output stride.

    Raises:
        ConfigError: The message says which trunks are valid.
    """
    if backbone.stem != "standard":
        raise ConfigError(
            f"segmentation needs a trunk with the standard stem (output stride {output_stride}); this one has the CIFAR stem"
        )
    if not backbone.arch.startswith(TIMM):
        return
    try:
        with torch.device("meta"):  # shapes only
            maps = DilatedTimm(backbone.arch, output_stride)(torch.empty(1, 3, 64, 96))
        fits = tuple(maps[1].shape[2:]) == (64 // output_stride, 96 // output_stride)
    except (AssertionError, AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
        fits = False  # timm's models say in many ways that they cannot
    if not fits:
        raise ConfigError(
            f"segmentation needs a trunk that can have output stride {output_stride}: {backbone.arch} cannot; ResNets, "
            f"timm/convnext_tiny, timm/regnety_016 and the like can"
        )


class FCNHead(nn.Module):
    """Convolutions, dropout and a 1×1 convolution: mmsegmentation's FCNHead, with its layers and initial weights."""

    def __init__(self, channels: int, num_classes: int, recipe: HeadRecipe) -> None:
        super().__init__()
        padding = recipe.dilation

        def conv(inside: int, dilation: int) -> nn.Sequential:
            layer = nn.Conv2d(inside, recipe.channels, 3, padding=dilation, dilation=dilation, bias=False)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            return nn.Sequential(layer, nn.BatchNorm2d(recipe.channels), nn.ReLU(inplace=True))

        widths = [channels, *[recipe.channels] * recipe.num_conv]
        self.convs = nn.Sequential(*[conv(inside, padding) for inside in widths[:-1]])
        # The joining convolution has no dilation, as there.
        self.join = conv(channels + widths[-1], 1) if recipe.concat_input else None
        self.dropout = nn.Dropout2d(recipe.dropout)
        self.classifier = nn.Conv2d(recipe.channels if recipe.concat_input else widths[-1], num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) to (N, classes, h, w) logits."""
        hidden = self.convs(features)
        if self.join is not None:
            hidden = self.join(torch.cat([features, hidden], dim=1))
        logits: Tensor = self.classifier(self.dropout(hidden))
        return logits.float()


class FCN(nn.Module):
    """A dilated trunk, a head, and in training an auxiliary head on the map before the last.

    Args:
        backbone: A trunk that `check_backbone` accepts.
        state: Its weights, loaded strictly.
        num_classes: The number of classes.
        output_stride: 8 or 16.
        align_corners: How logits are interpolated to the image's size.
        head: The head.
        auxiliary: The auxiliary head, or None.
    """

    def __init__(
        self,
        backbone: BackboneRecipe,
        state: dict[str, Tensor],
        num_classes: int,
        *,
        output_stride: int,
        align_corners: bool,
        head: HeadRecipe,
        auxiliary: AuxiliaryRecipe | None,
    ) -> None:
        super().__init__()
        self.num_classes, self.align_corners = num_classes, align_corners
        if backbone.arch.startswith(TIMM):
            dilated = DilatedTimm(backbone.arch, output_stride)
            dilated.load(state)
            self.trunk: DilatedTimm | DilatedResNet = dilated
        else:
            trunk = build_trunk(backbone)
            trunk.load_state_dict(state, strict=True)
            self.trunk = DilatedResNet(trunk, output_stride)
        before, last = self.trunk.channels
        self.head = FCNHead(last, num_classes, head)
        self.auxiliary = None if auxiliary is None else FCNHead(before, num_classes, auxiliary)

    def resized(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Logits interpolated to (H, W)."""
        return F.interpolate(logits, list(size), mode="bilinear", align_corners=self.align_corners)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, 3, H, W) normalised images to (N, classes, H, W) logits, and in training those of the auxiliary head."""
        before, last = self.trunk(images)
        logits = self.resized(self.head(last), images.shape[2:])
        if self.auxiliary is None or not self.training:
            return logits, None
        return logits, self.resized(self.auxiliary(before), images.shape[2:])
