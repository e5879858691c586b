"""The options of the RPN and the RoI heads of a two-stage detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from mixmask.engine.config import Recipe, added

Positive = Annotated[float, Field(gt=0)]
Width = Annotated[int, Field(ge=1)]


class RPNRecipe(Recipe):
    """Anchors, sampling and selection of the RPN; the defaults are Detectron2's for C4.

    ``anchor_sizes`` are square roots of areas in pixels, ``aspect_ratios`` heights over widths.
    """

    anchor_sizes: tuple[Positive, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    aspect_ratios: tuple[Positive, ...] = (0.5, 1.0, 2.0)
    batch_per_image: int = Field(256, ge=2)
    positive_fraction: float = Field(0.5, gt=0, lt=1)
    iou_negative: float = Field(0.3, ge=0, le=1)
    iou_positive: float = Field(0.7, ge=0, le=1)
    pre_nms_train: int = Field(12000, ge=1)
    post_nms_train: int = Field(2000, ge=1)
    pre_nms_test: int = Field(6000, ge=1)
    post_nms_test: int = Field(1000, ge=1)
    nms_threshold: float = Field(0.7, gt=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> RPNRecipe:
        if not self.anchor_sizes or not self.aspect_ratios:
            raise ValueError("anchor_sizes and aspect_ratios need at least one value each")
        if self.iou_negative > self.iou_positive:
            raise ValueError(f"iou_negative {self.iou_negative} is above iou_positive {self.iou_positive}")
        return self


class PyramidRPNRecipe(RPNRecipe):
    """The same for a pyramid: Detectron2's defaults for FPN.

    ``anchor_sizes`` has one size for each of the strides 4, 8, 16, 32 and 64. ``pre_nms`` counts per map, ``post_nms`` all.
    """

    pre_nms_train: int = Field(2000, ge=1)
    post_nms_train: int = Field(1000, ge=1)
    pre_nms_test: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _one_size_per_map(self) -> PyramidRPNRecipe:
        if len(self.anchor_sizes) != 5:
            raise ValueError(
                f"anchor_sizes: a pyramid has one size for each of its 5 maps; {len(self.anchor_sizes)} are given"
            )
        return self

    @property
    def sizes(self) -> list[list[float]]:
        """The anchor sizes of each map."""
        return [[size] for size in self.anchor_sizes]


class RoIRecipe(Recipe):
    """Sampling, pooling and final selection of the RoI heads; the defaults are Detectron2's for C4.

    ``smooth_l1_beta`` is where the box loss turns from a parabola to a line; 0 is L1.
    """

    batch_per_image: int = Field(512, ge=2)
    positive_fraction: float = Field(0.25, gt=0, lt=1)
    iou_positive: float = Field(0.5, gt=0, le=1)
    smooth_l1_beta: float = added(0.0, ge=0)
    pooler_resolution: int = Field(14, ge=2)
    score_threshold: float = Field(0.05, ge=0, lt=1)
    nms_threshold: float = Field(0.5, gt=0, le=1)
    detections_per_image: int = Field(100, ge=1)


class PyramidRoIRecipe(RoIRecipe):
    """The same for a pyramid: boxes are pooled to 7×7, masks to 14×14 (Detectron2's defaults for FPN)."""

    pooler_resolution: int = Field(7, ge=2)
    mask_pooler_resolution: int = Field(14, ge=2)


class BoxHeadRecipe(Recipe):
    """What follows the pooled regions: 3×3 convolutions, then fully connected layers.

    The default, four convolutions with batch normalisation and one layer, is that of self-supervised work (InfoMin, DenseCL,
    PixPro, SoCo: ``R_50_FPN_1x.yaml`` in their repositories). Detectron2's own is ``num_conv: 0, num_fc: 2``.
    """

    num_conv: int = Field(4, ge=0)
    conv_dim: int = Field(256, ge=1)
    num_fc: int = Field(1, ge=1)
    fc_dim: int = Field(1024, ge=1)
    norm: bool = True


class MaskHeadRecipe(Recipe):
    """The mask branch of a pyramid: 3×3 convolutions, with batch normalisation as in the same configs."""

    num_conv: int = Field(4, ge=0)
    conv_dim: int = Field(256, ge=1)
    norm: bool = True


class KeypointHeadRecipe(Recipe):
    """The keypoint branch: 3×3 convolutions and a transposed one, without normalisation (Detectron2's defaults)."""

    conv_dims: tuple[Width, ...] = (512,) * 8
    pooler_resolution: int = Field(14, ge=2)


def configure_rpn(model: Any, rpn: RPNRecipe, sizes: Sequence[Sequence[float]]) -> None:
    """Set the RPN's keys under ``MODEL`` of a Detectron2 config; ``sizes`` are the anchor sizes of each map."""
    model.ANCHOR_GENERATOR.SIZES = [list(own) for own in sizes]
    model.ANCHOR_GENERATOR.ASPECT_RATIOS = [list(rpn.aspect_ratios)]
    model.RPN.IOU_THRESHOLDS = [rpn.iou_negative, rpn.iou_positive]
    model.RPN.BATCH_SIZE_PER_IMAGE = rpn.batch_per_image
    model.RPN.POSITIVE_FRACTION = rpn.positive_fraction
    model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.POST_NMS_TOPK_TRAIN = rpn.pre_nms_train, rpn.post_nms_train
    model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST = rpn.pre_nms_test, rpn.post_nms_test
    model.RPN.NMS_THRESH = rpn.nms_threshold


def configure_roi(cfg: Any, roi: RoIRecipe, name: str, num_classes: int) -> None:
    """Set the keys of a Detectron2 config that its RoI heads ``name`` share with other ones."""
    heads = cfg.MODEL.ROI_HEADS
    heads.NAME, heads.NUM_CLASSES = name, num_classes
    heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION = roi.batch_per_image, roi.positive_fraction
    heads.IOU_THRESHOLDS = [roi.iou_positive]
    heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST = roi.score_threshold, roi.nms_threshold
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = roi.pooler_resolution
    cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = roi.smooth_l1_beta
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.TEST.DETECTIONS_PER_IMAGE = roi.detections_per_image
