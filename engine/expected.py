"""Expected scores, which stand in a config so that reproducing them can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mixmask.engine.config import Recipe


class Expectation(Recipe):
    """A published or measured value, and how far from it still counts as reproduced.

    ``metric`` is a metric's name in the record (``knn/top1``, ``bbox/AP``); ``value`` and ``tolerance`` are in its
    unit, percent. In a pretraining recipe an expectation applies to all transfer runs of its backbone that have the
    metric. ``protocol`` (``linear``, ``semisup_1``, ``detect_voc`` …) and ``dataset`` limit it to some of them.
    """

    metric: str = Field(min_length=1)
    value: float = Field(allow_inf_nan=False)
    tolerance: float = Field(ge=0, allow_inf_nan=False)
    source: str = Field(min_length=1)
    protocol: str | None = None
    dataset: str | None = None

    def describe(self) -> str:
        """The expectation in words, such as ``knn/top1 of knn on cifar10 85 ± 1 (Table 2)``."""
        of = " of " * bool(self.protocol or self.dataset) + " on ".join(filter(None, (self.protocol, self.dataset)))
        return f"{self.metric}{of} {self.value:g} ± {self.tolerance:g} ({self.source})"


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, Mapping | Expectation) else given


Expectations = Annotated[tuple[Expectation, ...], BeforeValidator(_as_list)]
