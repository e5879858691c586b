"""Configs that an earlier version dumped for Detectron2 import the head of C4 by this name."""

from mixmask.transfer.detection.detectors.c4.heads import Res5ROIHeadsExtraNorm

__all__ = ["Res5ROIHeadsExtraNorm"]
