"""The detectors, one package each: what is put here is found, and its recipe's ``kind`` can be used in configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from mixmask.engine.registry import Registry, literal_of
from mixmask.transfer.detection.detector import DetectorRecipe

DETECTORS: Registry[DetectorRecipe] = Registry(
    DetectorRecipe, __name__, "mixmask.detectors", "detector", literal_of("kind")
)

if TYPE_CHECKING:
    AnyDetector = DetectorRecipe
else:
    AnyDetector = Annotated[Union[tuple(DETECTORS.classes())], Field(discriminator="kind")]  # noqa: UP007
