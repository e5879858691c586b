"""The options of the RPN and the RoI heads of a two-stage detector."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mixmask.engine.config import Recipe

Positive = Annotated[float, Field(gt=0)]


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


class RoIRecipe(Recipe):
    """Sampling, pooling and final selection of the RoI heads; the defaults are Detectron2's for C4."""

    batch_per_image: int = Field(512, ge=2)
    positive_fraction: float = Field(0.25, gt=0, lt=1)
    iou_positive: float = Field(0.5, gt=0, le=1)
    pooler_resolution: int = Field(14, ge=2)
    score_threshold: float = Field(0.05, ge=0, lt=1)
    nms_threshold: float = Field(0.5, gt=0, le=1)
    detections_per_image: int = Field(100, ge=1)
