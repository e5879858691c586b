"""MoCo's head for Detectron2: res5 with one more BatchNorm (arXiv:1911.05722, appendix). Importing registers it."""

from __future__ import annotations

from typing import Any

from detectron2.layers import get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn


class Res5ROIHeadsExtraNorm(Res5ROIHeads):  # type: ignore[misc]
    """`Res5ROIHeads` with a norm (``MODEL.RESNETS.NORM``) after res5; it also builds ResNets of basic blocks."""

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        """The constructor's arguments, with the changed res5."""
        parts: dict[str, Any] = super().from_config(cfg, input_shape)
        channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8
        # Detectron2 makes res5 of bottlenecks at every depth.
        if cfg.MODEL.RESNETS.DEPTH < 50:
            parts["res5"] = nn.Sequential(*_basic_stage(cfg, channels))
        parts["res5"].add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return parts


def _basic_stage(cfg: Any, channels: int) -> list[nn.Module]:
    num_blocks = {18: 2, 34: 3}[cfg.MODEL.RESNETS.DEPTH]
    stage: list[nn.Module] = ResNet.make_stage(
        BasicBlock,
        num_blocks,
        stride_per_block=[2] + [1] * (num_blocks - 1),
        in_channels=channels // 2,
        out_channels=channels,
        norm=cfg.MODEL.RESNETS.NORM,
    )
    return stage


if "Res5ROIHeadsExtraNorm" not in ROI_HEADS_REGISTRY:
    ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)
