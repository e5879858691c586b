"""Faster and Mask R-CNN: an RPN and RoI heads on the maps of a backbone (arXiv:1506.01497, 1703.06870)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from mixmask.transfer.detection.detector import Detections, Targets
from mixmask.transfer.detection.layers.roi_heads import RoIHeads
from mixmask.transfer.detection.layers.rpn import RPN
from mixmask.transfer.detection.network import Detector


class TwoStageDetector(Detector):
    """A detector with ``rpn`` and ``roi_heads``; a subclass sets both and computes the maps."""

    rpn: RPN
    roi_heads: RoIHeads

    @abstractmethod
    def maps(self, images: list[Tensor]) -> list[Tensor]:
        """The feature maps of the RPN, the finest first; the RoI heads take what they need of them."""

    @override
    def losses(self, images: list[Tensor], targets: list[Targets], rng: list[torch.Generator]) -> dict[str, Tensor]:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        maps = self.maps(images)
        regions = self.rpn(maps)
        losses: dict[str, Tensor] = self.rpn.losses(regions, targets, rng)
        proposals = self.rpn.proposals(regions, sizes)
        losses.update(self.roi_heads.losses(maps, targets, self.roi_heads.sample(proposals, targets, rng)))
        return losses

    @override
    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        maps = self.maps(images)
        return self.roi_heads.detect(maps, self.rpn.proposals(self.rpn(maps), sizes), sizes)
