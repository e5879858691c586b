"""Projection heads: small networks between a trunk and the loss of its pretraining."""

from __future__ import annotations

import itertools
from typing import Literal

from torch import nn

from mixmask.engine.head_info import HeadInfo


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
