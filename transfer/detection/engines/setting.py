"""What an engine is given besides the recipe, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.precision import Precision
from mixmask.engine.storage import RunDirectory
from mixmask.transfer.detection.data.annotations import DetectionSet
from mixmask.transfer.detection.results.metrics import FoundObject


@dataclass(frozen=True)
class DetectionSetting:
    """Where a detection run happens and what it starts from.

    Attributes:
        run: Its folder.
        fingerprint: Identity of the recipe and the trunk.
        data: Identity of the data.
        device: This process's device.
        precision: Number format.
        seed: From it, every draw.
        title: Shown with the progress.
        log_every: Iterations between two log lines.
        checkpoint_every: Iterations between two checkpoints.
        backbone: The trunk's architecture.
        state: The trunk under torchvision's names.
        train_set: Pictures to train on.
        test_set: Pictures to evaluate on.
    """

    run: RunDirectory
    fingerprint: str
    data: dict[str, Any]
    device: torch.device
    precision: Precision
    seed: int
    title: str
    log_every: int
    checkpoint_every: int
    backbone: BackboneRecipe
    state: dict[str, Tensor]
    train_set: DetectionSet
    test_set: DetectionSet


@dataclass(frozen=True)
class Outcome:
    """What an engine gives back, on every process.

    Attributes:
        metrics: In percent; ``seconds`` and ``images_per_second`` of training among them.
        found: The detections of all test pictures; empty on processes that do not write.
        detector: The trained detector under Detectron2's names, if the recipe has ``save_detector``.
    """

    metrics: dict[str, float]
    found: list[FoundObject]
    detector: dict[str, Tensor]
