"""Projection heads: small networks between a trunk and the loss of its pretraining."""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn


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


class Head(nn.Sequential):
    """Linear layers with an activation between them: (N, widths[0]) to (N, widths[-1])."""

    def __init__(self, info: HeadInfo) -> None:
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(info.widths)):
            last = number == len(info.widths) - 2
            followed = info.last_norm if last else info.norm
            # A bias before BatchNorm would have no effect, because BatchNorm subtracts the mean.
            biased = not followed and (info.last_bias or not last)
            layers.append(nn.Linear(before, after, bias=biased))
            if followed:
                layers.append(nn.BatchNorm1d(after, affine=info.last_affine if last else True))
            if not last:
                layers.append(nn.ReLU(inplace=True) if info.activation == "relu" else nn.GELU())
        super().__init__(*layers)
        self.info = info


def mlp(
    widths: list[int],
    *,
    norm: bool,
    last_norm: bool = False,
    last_affine: bool = True,
    last_bias: bool = True,
    activation: Literal["relu", "gelu"] = "relu",
) -> Head:
    """Build a head; the arguments are the attributes of `HeadInfo`."""
    return Head(
        HeadInfo(
            widths=tuple(widths),
            norm=norm,
            last_norm=last_norm,
            last_affine=last_affine,
            last_bias=last_bias,
            activation=activation,
        )
    )
