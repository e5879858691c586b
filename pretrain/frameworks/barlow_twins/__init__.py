"""Barlow Twins (arXiv:2103.03230)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.batch_loss_recipe import BatchLossRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class BarlowTwinsRecipe(BatchLossRecipe):
    """The cross-correlation of two views' embeddings is pulled to the identity.

    ``off_diagonal`` is λ of equation 1, called so because λ is an area here.
    """

    kind: Literal["barlowtwins"] = "barlowtwins"
    off_diagonal: float = Field(0.0051, ge=0)
    scale: float = Field(1.0, gt=0, description="of the whole loss, as solo-learn's recipes have it")

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.barlow_twins.network import BarlowTwins

        return BarlowTwins(self, backbone)
