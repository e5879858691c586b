"""Networks that answer with classes: those that finetuning trains, and those that were saved."""

from __future__ import annotations

from torch import Tensor, nn

from mixmask.engine.backbones import build_trunk, width_of
from mixmask.transfer.classifier_file import ClassifierInfo
from mixmask.transfer.probes import FeatureNorm


class Classifier(nn.Module):
    """A trunk and a linear classifier, both of which are trained."""

    def __init__(self, trunk: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(True)
        self.head = nn.Linear(width_of(trunk), num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, classes) logits of (N, 3, H, W) normalised images."""
        logits: Tensor = self.head(self.trunk(images))
        return logits


class SavedClassifier(nn.Module):
    """(N, 3, H, W) normalised images to (N, classes) logits."""

    def __init__(self, info: ClassifierInfo) -> None:
        super().__init__()
        self.trunk = build_trunk(info.backbone)
        self.norm = FeatureNorm(width_of(self.trunk)) if info.batch_norm else None
        self.head = nn.Linear(width_of(self.trunk), len(info.classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        features = self.trunk(images)
        logits: Tensor = self.head(self.norm(features) if self.norm is not None else features)
        return logits
