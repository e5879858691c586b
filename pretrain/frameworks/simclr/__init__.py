"""SimCLR (arXiv:2002.05709)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.framework import MAX_WIDTH, FrameworkRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class SimCLRRecipe(FrameworkRecipe):
    """NT-Xent between two views, with negatives from the global batch (with ``accumulate``, from one part of it).

    The projector has BatchNorm after every linear layer, the last one included.
    """

    kind: Literal["simclr"] = "simclr"
    dim: int = Field(128, ge=1, le=MAX_WIDTH)
    projector_layers: int = Field(2, ge=1, le=10)
    projector_width: int | None = Field(None, ge=1, le=MAX_WIDTH, description="hidden width; null takes the trunk's")
    temperature: float = Field(0.5, gt=0)

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.simclr.network import SimCLR

        return SimCLR(self, backbone)
