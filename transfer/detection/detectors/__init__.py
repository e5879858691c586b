"""The detectors, one package each: what is put here is found, and its recipe's ``kind`` can be used in configs."""

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
