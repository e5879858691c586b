"""SwAV (arXiv:2006.09882)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.pretrain.framework import MAX_WIDTH
from mixmask.pretrain.multi_crop import MultiCropRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class SwAVRecipe(MultiCropRecipe):
    """Each view predicts the cluster assignment ("code") of the other full view; the small views predict both.

    ``epsilon`` is that of the Sinkhorn-Knopp algorithm. ``queue_size`` embeddings of each full view from earlier steps
    help to make the codes of a small batch; they are collected once ``queue_starts`` of the run is over, and used when there
    are enough (section 4.1; 15 epochs of 200 are 0.075). The prototypes stay as they are for the share
    ``freeze_prototypes`` of the run (one epoch of 400 is 0.0025).
    """

    kind: Literal["swav"] = "swav"
    dim: int = Field(128, ge=1, le=MAX_WIDTH)
    projector_width: int = Field(2048, ge=1, le=MAX_WIDTH)
    prototypes: int = Field(3000, ge=2, le=MAX_WIDTH)
    temperature: float = Field(0.1, gt=0)
    epsilon: float = Field(0.05, gt=0)
    sinkhorn_iterations: int = Field(3, ge=1, le=1000)
    queue_size: int = Field(0, ge=0, le=2**24)
    queue_starts: float = Field(0.0, ge=0, le=1)
    freeze_prototypes: float = Field(0.0025, ge=0, le=1)

    @override
    def full_passes(self, hidden: bool) -> tuple[int, int]:
        return 2, 2 * hidden

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.swav.network import SwAV

        return SwAV(self, backbone)
