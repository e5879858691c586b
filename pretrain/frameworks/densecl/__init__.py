"""DenseCL (arXiv:2011.09157)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.frameworks.moco import MomentumContrastRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class DenseCLRecipe(MomentumContrastRecipe):
    """MoCo v2, and the same contrast between places of the last maps, with a queue of its own.

    ``dense_weight`` is λ of equation 3, called so because λ is an area here.
    """

    compiles: ClassVar[bool] = False

    kind: Literal["densecl"] = "densecl"
    dense_weight: float = Field(0.5, ge=0, le=1)

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.densecl.network import DenseCL

        return DenseCL(self, backbone)
