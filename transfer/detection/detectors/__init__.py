"""The detectors, one package each. A package in this folder is found; configs name it by its recipe's ``kind``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixmask.engine.registry import Registry, literal_of, one_of
from mixmask.transfer.detection.detector import DetectorRecipe

DETECTORS: Registry[DetectorRecipe] = Registry(
    DetectorRecipe, __name__, "mixmask.detectors", "detector", literal_of("kind")
)

if TYPE_CHECKING:
    AnyDetector = DetectorRecipe
else:
    AnyDetector = one_of(DETECTORS)
