"""The old import path of C4's head, which configs that an earlier version wrote for Detectron2 still use."""

from mixmask.transfer.detection.detectors.c4.heads import Res5ROIHeadsExtraNorm

__all__ = ["Res5ROIHeadsExtraNorm"]
