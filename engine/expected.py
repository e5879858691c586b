"""What a config expects its run to come to, so that reproduction is a check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mixmask.engine.config import Recipe


class Expectation(Recipe):
    """A published or measured value, and how far from it still counts as reproduced.

    ``metric`` is a name from the record (``knn/top1``, ``bbox/AP``) and ``value`` and ``tolerance`` are in its unit,
    percent. A pretraining recipe expects something of transfer runs of its backbone: of those with that metric, or only
    those of a ``protocol`` (``linear``, ``semisup_1``, ``detect_voc`` …) and a ``dataset``.
    """

    metric: str = Field(min_length=1)
    value: float = Field(allow_inf_nan=False)
    tolerance: float = Field(ge=0, allow_inf_nan=False)
    source: str = Field(min_length=1)
    protocol: str | None = None
    dataset: str | None = None

    def describe(self) -> str:
        """In words."""
        of = " of " * bool(self.protocol or self.dataset) + " on ".join(filter(None, (self.protocol, self.dataset)))
        return f"{self.metric}{of} {self.value:g} ± {self.tolerance:g} ({self.source})"


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, Mapping | Expectation) else given


Expectations = Annotated[tuple[Expectation, ...], BeforeValidator(_as_list)]
