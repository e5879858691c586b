"""R50-C4: Faster and Mask R-CNN on the stride-16 map, with MoCo's BatchNorm after res5 (arXiv:1911.05722, appendix)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.transfer.detection.detector import DetectorRecipe
from mixmask.transfer.detection.detectors.c4.names import detector_to_detectron2
from mixmask.transfer.detection.detectors.c4.network import C4Detector, check_backbone
from mixmask.transfer.detection.layers.recipes import RoIRecipe, RPNRecipe

HEADS = "Res5ROIHeadsExtraNorm"  # as `heads` registers them


class C4Recipe(DetectorRecipe):
    """conv1 … layer3 of a ResNet as the backbone, layer4 as the RoI head."""

    kind: Literal["c4"] = "c4"
    rpn: RPNRecipe = RPNRecipe()
    roi: RoIRecipe = RoIRecipe()

    @override
    def check_backbone(self, backbone: BackboneRecipe) -> None:
        check_backbone(backbone)

    @override
    def build(self, backbone: BackboneRecipe, state: dict[str, Tensor], num_classes: int, masks: bool) -> C4Detector:
        return C4Detector(backbone, state, num_classes, masks, self.rpn, self.roi)

    @property
    @override
    def detectron2_module(self) -> str:
        return "mixmask.transfer.detection.detectors.c4.heads"

    @override
    def configure(self, cfg: Any, backbone: BackboneRecipe, num_classes: int) -> None:
        model = cfg.MODEL
        model.ANCHOR_GENERATOR.SIZES = [list(self.rpn.anchor_sizes)]
        model.ANCHOR_GENERATOR.ASPECT_RATIOS = [list(self.rpn.aspect_ratios)]
        model.RPN.IOU_THRESHOLDS = [self.rpn.iou_negative, self.rpn.iou_positive]
        model.RPN.BATCH_SIZE_PER_IMAGE = self.rpn.batch_per_image
        model.RPN.POSITIVE_FRACTION = self.rpn.positive_fraction
        model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.POST_NMS_TOPK_TRAIN = self.rpn.pre_nms_train, self.rpn.post_nms_train
        model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST = self.rpn.pre_nms_test, self.rpn.post_nms_test
        model.RPN.NMS_THRESH = self.rpn.nms_threshold
        heads = model.ROI_HEADS
        heads.NAME, heads.NUM_CLASSES = HEADS, num_classes
        heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION = self.roi.batch_per_image, self.roi.positive_fraction
        heads.IOU_THRESHOLDS = [self.roi.iou_positive]
        heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST = self.roi.score_threshold, self.roi.nms_threshold
        model.ROI_BOX_HEAD.POOLER_RESOLUTION = self.roi.pooler_resolution
        model.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        cfg.TEST.DETECTIONS_PER_IMAGE = self.roi.detections_per_image

    @override
    def to_detectron2(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return detector_to_detectron2(state)

    @override
    def place_in_detectron2(self, name: str) -> str:
        return f"{'roi_heads' if name.startswith('res5') else 'backbone'}.{name}"
