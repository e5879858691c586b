"""Masks of detections as COCO's run-length code, drawn straight into it: an image-sized array is never made."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor


def encode_mask(mask: Tensor, box: tuple[float, float, float, float], height: int, width: int) -> dict[str, Any]:
    """Put an (M, M) probability mask into its box of an image, bilinearly, threshold it at 0.5, and encode it.

    The result is that of pycocotools' ``encode`` of the whole image, byte for byte.

    Args:
        mask: (M, M) in [0, 1], on the CPU.
        box: Left, top, right, bottom in the pixels of the image.
        height: Image height.
        width: Image width.

    Returns:
        ``{"size": [height, width], "counts": bytes}``.
    """
    left, top, right, bottom = box
    x0, y0 = max(math.floor(left) - 1, 0), max(math.floor(top) - 1, 0)
    x1, y1 = min(math.ceil(right) + 1, width), min(math.ceil(bottom) + 1, height)
    changes = np.zeros(0, dtype=np.int64)
    if x1 > x0 and y1 > y0 and right > left and bottom > top:
        # Pixel centres in the coordinates of grid_sample: -1 and 1 are the borders of the box.
        x = (torch.arange(x0, x1) + 0.5 - left) / (right - left) * 2 - 1
        y = (torch.arange(y0, y1) + 0.5 - top) / (bottom - top) * 2 - 1
        # Columns first, as in the code: its runs go down the columns.
        shape = (len(x), len(y))
        grid = torch.stack([x[:, None].expand(shape), y[None].expand(shape)], dim=-1)[None]
        values = F.grid_sample(mask.float()[None, None], grid, align_corners=False)[0, 0]
        changes = _changes((values >= 0.5).numpy(), x0, y0, height)
    pixels = height * width
    counts = np.diff(changes[changes < pixels], prepend=0, append=pixels)  # the last run ends with the image
    encoded: dict[str, Any] = coco_mask.frPyObjects({"counts": counts.tolist(), "size": [height, width]}, height, width)
    return encoded


def _changes(inside: np.typing.NDArray[np.bool_], x0: int, y0: int, height: int) -> np.typing.NDArray[np.int64]:
    """Where an image of ``height``, read column by column, changes between outside and inside.

    Args:
        inside: (w, h), the columns of a part of the image.
        x0: Its first column.
        y0: Its first row.
        height: Height of the whole image.
    """
    framed = np.zeros((inside.shape[0], inside.shape[1] + 2), dtype=np.int8)
    framed[:, 1:-1] = inside
    column, row = np.nonzero(np.diff(framed, axis=1))
    changes = (x0 + column) * height + y0 + row  # in turn the beginning and the end of a run
    # A run that ends at the bottom of a column goes on if the next column begins inside.
    goes_on = changes[1:-1:2] == changes[2::2]
    kept = np.ones(len(changes), dtype=bool)
    kept[1:-1:2] &= ~goes_on
    kept[2::2] &= ~goes_on
    result: np.typing.NDArray[np.int64] = changes[kept]
    return result
