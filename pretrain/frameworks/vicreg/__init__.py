"""VICReg (arXiv:2105.04906)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.batch_loss_recipe import BatchLossRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class VICRegRecipe(BatchLossRecipe):
    """Two views' embeddings are pulled together, their components kept spread and uncorrelated.

    The three coefficients are λ, μ and ν of equation 6 in the paper; their values are those of its code.
    """

    kind: Literal["vicreg"] = "vicreg"
    invariance: float = Field(25.0, ge=0)
    variance: float = Field(25.0, ge=0)
    covariance: float = Field(1.0, ge=0)

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.vicreg.network import VICReg

        return VICReg(self, backbone)
