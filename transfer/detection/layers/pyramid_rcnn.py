"""Faster, Mask and Keypoint R-CNN on a feature pyramid: the RPN on five of its levels, RoI heads on four."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.transfer.detection.layers.heads import BoxHead, MaskHead
from mixmask.transfer.detection.layers.keypoints import KeypointHead
from mixmask.transfer.detection.layers.pyramid import STRIDES, Pyramid, pool_from_levels, trunk_maps
from mixmask.transfer.detection.layers.recipes import (
    BoxHeadRecipe,
    KeypointHeadRecipe,
    MaskHeadRecipe,
    PyramidRoIRecipe,
    PyramidRPNRecipe,
)
from mixmask.transfer.detection.layers.roi_heads import RoIHeads
from mixmask.transfer.detection.layers.rpn import RPN
from mixmask.transfer.detection.layers.two_stage import TwoStageDetector


class PyramidRoIHeads(RoIHeads):
    """Regions pooled from the level that fits their size; boxes, masks and keypoints have heads of their own.

    Args:
        channels: Channels of the pyramid.
        num_classes: Foreground classes.
        roi: The options for sampling, pooling and selection.
        box_head: The box head.
        mask_head: The mask branch; None without masks.
        keypoint_head: The keypoint branch; None without keypoints.
        num_keypoints: Of each object.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        roi: PyramidRoIRecipe,
        box_head: BoxHeadRecipe,
        mask_head: MaskHeadRecipe | None,
        keypoint_head: KeypointHeadRecipe | None,
        num_keypoints: int,
    ) -> None:
        super().__init__(num_classes, roi)
        self.size, self.mask_size = roi.pooler_resolution, roi.mask_pooler_resolution
        self.keypoint_size = 0 if keypoint_head is None else keypoint_head.pooler_resolution
        self.box_head = BoxHead(
            channels,
            self.size,
            num_conv=box_head.num_conv,
            conv_dim=box_head.conv_dim,
            num_fc=box_head.num_fc,
            fc_dim=box_head.fc_dim,
            norm=box_head.norm,
        )
        self.add_predictors(box_head.fc_dim)
        if mask_head is not None:
            self.mask_head = MaskHead(channels, num_classes, mask_head.num_conv, mask_head.conv_dim, mask_head.norm)
        if keypoint_head is not None:
            self.keypoint_head = KeypointHead(channels, keypoint_head.conv_dims, num_keypoints)

    @override
    def vectors(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, None]:
        vectors: Tensor = self.box_head(pool_from_levels(maps[: len(STRIDES)], boxes, self.size))
        return vectors, None

    @override
    def for_masks(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        return pool_from_levels(maps[: len(STRIDES)], boxes, self.mask_size)

    @override
    def for_keypoints(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        return pool_from_levels(maps[: len(STRIDES)], boxes, self.keypoint_size)


class PyramidRCNN(TwoStageDetector):
    """Faster R-CNN on a feature pyramid; with a mask head Mask R-CNN, with a keypoint head Keypoint R-CNN.

    Args:
        backbone: A trunk that `check_maps` accepts.
        state: Its weights, loaded strictly.
        num_classes: Foreground classes.
        channels: Channels of the pyramid.
        norm: Whether the pyramid has batch normalisation.
        rpn: The options of the RPN.
        roi: The options of the RoI heads.
        box_head: The box head.
        mask_head: The mask branch; None without masks.
        keypoint_head: The keypoint branch; None without keypoints.
        num_keypoints: Of each object.
    """

    multiple_of = STRIDES[-1]

    def __init__(
        self,
        backbone: BackboneRecipe,
        state: dict[str, Tensor],
        num_classes: int,
        *,
        channels: int,
        norm: bool,
        rpn: PyramidRPNRecipe,
        roi: PyramidRoIRecipe,
        box_head: BoxHeadRecipe,
        mask_head: MaskHeadRecipe | None = None,
        keypoint_head: KeypointHeadRecipe | None = None,
        num_keypoints: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = Pyramid(trunk_maps(backbone, state), len(STRIDES), channels, norm, LastLevelMaxPool())
        self.rpn = RPN(channels, [*STRIDES, 2 * STRIDES[-1]], rpn.sizes, rpn)
        self.roi_heads = PyramidRoIHeads(channels, num_classes, roi, box_head, mask_head, keypoint_head, num_keypoints)

    @property
    @override
    def bottlenecks(self) -> bool:
        return self.backbone.trunk.bottlenecks

    @override
    def maps(self, images: list[Tensor]) -> list[Tensor]:
        """The maps of strides 4 … 64, (N, channels, ·, ·)."""
        maps: list[Tensor] = self.backbone(self.batch(images))
        return maps
