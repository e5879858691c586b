"""Heads on pooled regions, with Detectron2's layers, names and initial weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override


class ConvNormReLU(nn.Conv2d):
    """A 3×3 convolution, batch normalisation (instead of a bias) if asked for, and ReLU.

    The normalisation is the child ``norm``, as in Detectron2.
    """

    def __init__(self, channels: int, out_channels: int, norm: bool) -> None:
        super().__init__(channels, out_channels, kernel_size=3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(input)))


class BoxHead(nn.Sequential):
    """3×3 convolutions, then fully connected layers (Detectron2's ``FastRCNNConvFCHead``): (R, C, S, S) to (R, width).

    Args:
        channels: C.
        size: S, the resolution of the pooled regions.
        num_conv: The number of convolutions.
        conv_dim: Their channels.
        num_fc: The number of fully connected layers, at least 1.
        fc_dim: Their width.
        norm: Whether the convolutions have batch normalisation.
    """

    def __init__(
        self, channels: int, size: int, *, num_conv: int, conv_dim: int, num_fc: int, fc_dim: int, norm: bool
    ) -> None:
        super().__init__()
        for number in range(num_conv):
            self.add_module(f"conv{number + 1}", ConvNormReLU(channels, conv_dim, norm))
            channels = conv_dim
        self.add_module("flatten", nn.Flatten())
        width = channels * size * size
        for number in range(num_fc):
            layer = nn.Linear(width, fc_dim)
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
            self.add_module(f"fc{number + 1}", layer)
            self.add_module(f"fc_relu{number + 1}", nn.ReLU())
            width = fc_dim


class MaskHead(nn.Sequential):
    """Convolutions, one transposed convolution, one 1×1 convolution (Mask R-CNN, arXiv:1703.06870, figure 4).

    (R, C, S, S) to (R, classes, 2S, 2S) logits. Without 3×3 convolutions it is C4's branch (left), with four that of FPN
    (right).

    Args:
        channels: Channels of the pooled regions.
        num_classes: Foreground classes.
        num_conv: The number of 3×3 convolutions.
        dim: Channels inside.
        norm: Whether the 3×3 convolutions have batch normalisation.
    """

    def __init__(self, channels: int, num_classes: int, num_conv: int = 0, dim: int = 256, norm: bool = False) -> None:
        super().__init__()
        for number in range(num_conv):
            self.add_module(f"mask_fcn{number + 1}", ConvNormReLU(channels, dim, norm))
            channels = dim
        self.deconv = nn.ConvTranspose2d(channels, dim, kernel_size=2, stride=2)
        self.deconv_relu = nn.ReLU()
        self.predictor = nn.Conv2d(dim, num_classes, kernel_size=1)
        # Initialised as Detectron2's MaskRCNNConvUpsampleHead.
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for layer in (self.deconv, self.predictor):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
