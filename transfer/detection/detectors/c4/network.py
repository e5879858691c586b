"""The R50-C4 detector: conv1 … layer3 of a trunk as the backbone, layer4 as the RoI head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.backbones import TIMM, BackboneRecipe, build_trunk, width_of
from mixmask.engine.errors import ConfigError
from mixmask.transfer.detection.detectors.c4.roi import Res5RoIHeads
from mixmask.transfer.detection.layers.recipes import RoIRecipe, RPNRecipe
from mixmask.transfer.detection.layers.rpn import RPN
from mixmask.transfer.detection.layers.two_stage import TwoStageDetector

STRIDE = 16  # of layer3's map, in pixels of the image


def check_backbone(backbone: BackboneRecipe) -> None:
    """Refuse a trunk from which no C4 detector can be made.

    Raises:
        ConfigError: If it is not a ResNet with stride 16 after its third stage and batch normalisation.
    """
    if backbone.stem != "standard":
        raise ConfigError(
            "detection (C4) needs a trunk with the standard stem (stride 16 after layer3); this one has the CIFAR stem"
        )
    if backbone.arch.startswith(TIMM):
        from timm.models.resnet import ResNet

        with torch.device("meta"):
            trunk = build_trunk(backbone)
        fits = isinstance(trunk, ResNet) and [stage["reduction"] for stage in trunk.feature_info] == [2, 4, 8, 16, 32]
        if not fits or type(trunk.get_submodule("bn1")) is not nn.BatchNorm2d:
            raise ConfigError(
                f"detection (C4) puts the regions through a ResNet's last stage: {backbone.arch} is no ResNet with "
                f"batch normalisation and strides 4, 8, 16, 32; timm/resnet50, timm/resnext50_32x4d and the like are"
            )


class C4Detector(TwoStageDetector):
    """Faster R-CNN, or Mask R-CNN with masks, on a stride-16 map.

    Args:
        backbone: A ResNet that `check_backbone` accepts.
        state: The pretrained trunk under torchvision's (or timm's) names, loaded strictly.
        num_classes: Foreground classes.
        masks: Whether to add a mask head.
        rpn: The options of the RPN.
        roi: The options of the RoI heads.
    """

    def __init__(
        self,
        backbone: BackboneRecipe,
        state: dict[str, Tensor],
        num_classes: int,
        masks: bool,
        rpn: RPNRecipe,
        roi: RoIRecipe,
    ) -> None:
        super().__init__()
        trunk: Any = build_trunk(backbone)
        trunk.load_state_dict(state, strict=True)
        activation = trunk.act1 if backbone.arch.startswith(TIMM) else trunk.relu
        self.stem = nn.Sequential(trunk.conv1, trunk.bn1, activation, trunk.maxpool)
        self.res2, self.res3, self.res4 = trunk.layer1, trunk.layer2, trunk.layer3
        channels = width_of(trunk)
        self.rpn = RPN(channels // 2, [STRIDE], [rpn.anchor_sizes], rpn)
        self.roi_heads = Res5RoIHeads(trunk.layer4, channels, STRIDE, num_classes, masks, roi)

    @property
    @override
    def bottlenecks(self) -> bool:
        return hasattr(self.res2[0], "conv3")

    def trunk_state(self) -> dict[str, Tensor]:
        """The trunk inside the detector, under torchvision's names again."""
        parts = {
            "conv1": self.stem[0],
            "bn1": self.stem[1],
            "layer1": self.res2,
            "layer2": self.res3,
            "layer3": self.res4,
            "layer4": self.roi_heads.res5,
        }
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}

    @override
    def maps(self, images: list[Tensor]) -> list[Tensor]:
        """The stride-16 map, (N, 1024, H/16, W/16) for a ResNet-50."""
        return [self.res4(self.res3(self.res2(self.stem(self.batch(images)))))]
