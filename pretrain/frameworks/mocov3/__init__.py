"""MoCo v3 in its form for ConvNets (arXiv:2104.02057, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.framework import MAX_WIDTH, FrameworkRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class MoCoV3Recipe(FrameworkRecipe):
    """Momentum contrast without a queue: the keys of the batch are the negatives, and queries have a predictor.

    The default values and layers are those of ``facebookresearch/moco-v3`` for ResNets: projector and predictor have one
    hidden layer; the projector ends in batch normalisation without weights, the predictor in a layer without bias.
    ``momentum`` rises to 1 along half a cosine over the run. With ``accumulate``, negatives come from one part.
    """

    kind: Literal["mocov3"] = "mocov3"
    dim: int = Field(256, ge=1, le=MAX_WIDTH)
    projector_width: int = Field(4096, ge=1, le=MAX_WIDTH)
    momentum: float = Field(0.99, ge=0, lt=1)
    temperature: float = Field(1.0, gt=0)

    @override
    def full_passes(self, hidden: bool) -> tuple[int, int]:
        return 2, 2

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.mocov3.network import MoCoV3

        return MoCoV3(self, backbone)
