"""BYOL (arXiv:2006.07733)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.framework import MAX_WIDTH, FrameworkRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class BYOLRecipe(FrameworkRecipe):
    """An online network predicts the projections of its moving average, without negatives.

    ``momentum`` is τ at the start; it rises to 1 along half a cosine over the run (section 3.3 of the paper). The predictor
    has the projector's shape.
    """

    kind: Literal["byol"] = "byol"
    dim: int = Field(256, ge=1, le=MAX_WIDTH)
    projector_layers: int = Field(2, ge=1, le=10)
    projector_width: int = Field(4096, ge=1, le=MAX_WIDTH)
    momentum: float = Field(0.996, ge=0, lt=1)

    @override
    def full_passes(self, hidden: bool) -> tuple[int, int]:
        return 2, 2

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.byol.network import BYOL

        return BYOL(self, backbone)
