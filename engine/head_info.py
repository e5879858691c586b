"""What a projection head is built from."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class HeadInfo(BaseModel):
    """What a head is built from; stored in the backbone file beside its tensors.

    Attributes:
        widths: Input, hidden and output widths.
        norm: BatchNorm before each activation.
        last_norm: BatchNorm after the last layer.
        last_affine: Whether the last BatchNorm has weight and bias.
        activation: Between the layers.
        last_bias: Whether the last layer has a bias, if no BatchNorm follows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: tuple[int, ...] = Field(min_length=2, max_length=20)
    norm: bool
    last_norm: bool = False
    last_affine: bool = True
    last_bias: bool = True
    activation: Literal["relu", "gelu"] = "relu"
