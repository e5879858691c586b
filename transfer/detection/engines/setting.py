"""The inputs of a detection engine besides the recipe, and its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.late import torch
from mixmask.engine.precision import Precision
from mixmask.engine.storage import RunDirectory
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.results.metrics import FoundObject

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DetectionSetting:
    """Where a detection run happens and what it starts from.

    Attributes:
        run: The run directory.
        fingerprint: Identity of the recipe and the trunk.
        data: Identity of the data.
        device: The device of this rank.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        seed: The seed of every random draw.
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
    """What an engine returns, on every rank.

    Attributes:
        metrics: Flat metrics, average precisions in percent; with ``seconds`` and ``images_per_second`` of training.
        found: The detections of all test pictures on rank 0; empty on the other ranks.
        detector: The trained detector under Detectron2's names, if the recipe has ``save_detector``.
    """

    metrics: dict[str, float]
    found: list[FoundObject]
    detector: dict[str, Tensor]
