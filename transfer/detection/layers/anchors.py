"""Anchors on one feature map or on the maps of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mixmask.transfer.detection.layers.boxes import cell_anchors, grid_anchors


class Anchors(nn.Module):
    """The anchors of every position of every map; without parameters, and without a place in the state dict.

    Args:
        strides: The stride of each map, in pixels of the image.
        sizes: For each map, square roots of the anchors' areas in pixels.
        aspect_ratios: Heights over widths.
    """

    def __init__(
        self, strides: Sequence[int], sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float]
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        for number, own in enumerate(sizes):
            self.register_buffer(f"cells{number}", cell_anchors(own, aspect_ratios), persistent=False)
        self.per_position = len(sizes[0]) * len(aspect_ratios)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of each (N, C, H, W) map: (H · W · A, 4), rows first, then columns, then the A of a position."""
        return [
            grid_anchors(self.get_buffer(f"cells{number}"), one.shape[2], one.shape[3], stride)
            for number, (one, stride) in enumerate(zip(maps, self.strides, strict=True))
        ]


def by_anchor(prediction: Tensor, width: int) -> Tensor:
    """(N, A · ``width``, H, W) of a convolution to (N, H · W · A, ``width``), in the order of `Anchors`, as float32."""
    num, _, height, length = prediction.shape
    # float32 also under autocast: losses and box arithmetic need it.
    split = prediction.float().view(num, -1, width, height, length)
    return split.permute(0, 3, 4, 1, 2).reshape(num, -1, width)
