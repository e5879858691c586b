"""The RoI heads of C4: RoIAlign, res5 with MoCo's extra BatchNorm, and the class, box and mask predictors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align
from typing_extensions import override

from mixmask.transfer.detection.layers.heads import MaskHead
from mixmask.transfer.detection.layers.recipes import RoIRecipe
from mixmask.transfer.detection.layers.roi_heads import RoIHeads


class Res5RoIHeads(RoIHeads):
    """RoIAlign on one map, then res5, an extra BatchNorm, and the predictors (MoCo's Res5ROIHeadsExtraNorm).

    Args:
        res5: The trunk's last stage.
        channels: The number of its output channels.
        stride: The stride of the feature map, in pixels of the image.
        num_classes: Foreground classes.
        masks: Whether there is a mask branch.
        recipe: The options for sampling, pooling and selection.
    """

    def __init__(
        self, res5: nn.Module, channels: int, stride: int, num_classes: int, masks: bool, recipe: RoIRecipe
    ) -> None:
        super().__init__(num_classes, recipe)
        self.stride, self.res5 = stride, res5
        # A BN in the newly initialised head calibrates the features' magnitudes (arXiv:1911.05722, section 4.2).
        self.norm = nn.BatchNorm2d(channels)
        self.add_predictors(channels)
        if masks:
            self.mask_head = MaskHead(channels, num_classes)

    def pool(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """(N, C, H, W) and boxes per image to (R, C', S, S): RoIAlign (aligned, adaptive sampling), res5, BatchNorm."""
        (features,) = maps
        size = self.recipe.pooler_resolution
        rois = roi_align(features.float(), boxes, size, 1.0 / self.stride, sampling_ratio=0, aligned=True)
        if features.is_contiguous(memory_format=torch.channels_last):  # RoIAlign's output never is
            rois = rois.contiguous(memory_format=torch.channels_last)
        pooled: Tensor = self.norm(self.res5(rois))
        return pooled

    @override
    def vectors(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        pooled = self.pool(maps, boxes)
        return pooled.mean(dim=(2, 3)), pooled

    @override
    def for_masks(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        return self.pool(maps, boxes)
