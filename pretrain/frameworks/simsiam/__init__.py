"""SimSiam (arXiv:2011.10566)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.framework import MAX_WIDTH, FrameworkRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class SimSiamRecipe(FrameworkRecipe):
    """Two views, a predictor and a stop-gradient, without negatives or a momentum encoder.

    The projector's hidden layers have the trunk's width, and its last BatchNorm has no weight and bias. The predictor's
    hidden layer is a bottleneck of ``dim`` / 4 (section 3 of the paper). ``fixed_predictor_lr`` keeps the predictor's
    learning rate constant (table 1c of the paper).
    """

    kind: Literal["simsiam"] = "simsiam"
    dim: int = Field(2048, ge=4, le=MAX_WIDTH)
    projector_layers: int = Field(3, ge=1, le=10)
    predictor_width: int | None = Field(
        None, ge=1, le=MAX_WIDTH, description="the bottleneck; null takes a quarter of dim"
    )
    fixed_predictor_lr: bool = True

    @override
    def full_passes(self, hidden: bool) -> tuple[int, int]:
        return 2, 2 * hidden

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.simsiam.network import SimSiam

        return SimSiam(self, backbone)
