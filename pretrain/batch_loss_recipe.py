"""The options that losses of a whole batch share."""

from __future__ import annotations

from pydantic import Field

from mixmask.pretrain.framework import MAX_WIDTH, FrameworkRecipe


class BatchLossRecipe(FrameworkRecipe):
    """The projector has hidden layers with batch normalisation, and a last layer without bias.

    Statistics are over the images of all processes; with ``accumulate``, over one part.
    """

    dim: int = Field(8192, ge=2, le=MAX_WIDTH)
    projector_layers: int = Field(3, ge=1, le=10)
    projector_width: int = Field(8192, ge=1, le=MAX_WIDTH)
