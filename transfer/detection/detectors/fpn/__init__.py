"""R50-FPN: Faster and Mask R-CNN on a feature pyramid (arXiv:1612.03144), as self-supervised work finetunes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.transfer.detection.layers.pyramid_recipe import PyramidRCNNRecipe
from mixmask.transfer.detection.layers.recipes import MaskHeadRecipe, PyramidRoIRecipe, PyramidRPNRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from mixmask.transfer.detection.network import Detector


class FPNRecipe(PyramidRCNNRecipe):
    """A pyramid on the trunk's four maps, the RPN on five levels, and RoI heads on four; on COCO with masks."""

    kind: Literal["fpn"] = "fpn"
    rpn: PyramidRPNRecipe = PyramidRPNRecipe()
    roi: PyramidRoIRecipe = PyramidRoIRecipe()
    mask_head: MaskHeadRecipe = MaskHeadRecipe()

    @property
    @override
    def label(self) -> str:
        return "FPN"

    @override
    def build(self, backbone: BackboneRecipe, state: dict[str, Tensor], num_classes: int, masks: bool) -> Detector:
        from mixmask.transfer.detection.layers.pyramid_rcnn import PyramidRCNN

        return PyramidRCNN(
            backbone,
            state,
            num_classes,
            channels=self.channels,
            norm=self.norm,
            rpn=self.rpn,
            roi=self.roi,
            box_head=self.box_head,
            mask_head=self.mask_head if masks else None,
        )

    @override
    def configure(self, cfg: Any, backbone: BackboneRecipe, num_classes: int) -> None:
        self.configure_heads(cfg, self.rpn, self.roi, num_classes)
        mask = cfg.MODEL.ROI_MASK_HEAD
        mask.NUM_CONV, mask.CONV_DIM = self.mask_head.num_conv, self.mask_head.conv_dim
        mask.NORM = cfg.MODEL.RESNETS.NORM if self.mask_head.norm else ""
        mask.POOLER_RESOLUTION = self.roi.mask_pooler_resolution
