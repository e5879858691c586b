"""Masks of detections as COCO's run-length code, drawn straight into it: an image-sized array is never made."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

BEGINNING = np.zeros(1, dtype=np.int64)


def encode_mask(mask: Floats, box: tuple[float, float, float, float], height: int, width: int) -> dict[str, Any]:
    """Put an (M, M) probability mask into its box of an image, bilinearly, threshold it at 0.5, and encode it.

    The code is that of pycocotools' ``encode`` of the whole image, byte for byte. Pixels are sampled as by torch's
    ``grid_sample`` without aligned corners, zeros outside, up to rounding.

    Args:
        mask: (M, M) in [0, 1].
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
        framed = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), dtype=np.float32)  # outside of the box is 0
        framed[1:-1, 1:-1] = mask
        column, to_right = _between(left, right, x0, x1, mask.shape[1])
        row, down = _between(top, bottom, y0, y1, mask.shape[0])
        across = _mixed(framed, column, to_right, axis=1)
        inside = _mixed(across, row, down[:, None], axis=0) >= 0.5
        changes = _changes(inside.T, x0, y0, height)
    pixels = height * width
    ends = np.concatenate([BEGINNING, changes[changes < pixels], [pixels]])  # the last run ends with the image
    counts = ends[1:] - ends[:-1]
    encoded: dict[str, Any] = coco_mask.frPyObjects({"counts": counts.tolist(), "size": [height, width]}, height, width)
    return encoded


def _mixed(values: Floats, place: Indices, share: Floats, axis: int) -> Floats:
    """Rows or columns between those at ``place`` and the next ones."""
    here, mixed = values.take(place, axis=axis), values.take(place + 1, axis=axis)
    mixed -= here  # in place: allocating is what takes the time
    mixed *= share
    mixed += here
    return mixed


def _between(low: float, high: float, first: int, last: int, cells: int) -> tuple[Indices, Floats]:
    """Where the centres of the pixels ``first`` … ``last`` - 1 lie among the centres of a side's cells.

    Returns:
        The cell to the left or above, counted in a mask with a frame of one cell, and the distance to it, in [0, 1].
    """
    place = np.arange(first, last, dtype=np.float32)
    place += np.float32(0.5 - low)
    place *= np.float32(cells / (high - low))
    place += np.float32(0.5)
    np.maximum(place, 0, out=place)
    np.minimum(place, cells + 1, out=place)
    cell = np.minimum(place.astype(np.int64), cells)
    place -= cell
    return cell, place


def _changes(inside: npt.NDArray[np.bool_], x0: int, y0: int, height: int) -> Indices:
    """Where an image of ``height``, read column by column, changes between outside and inside.

    Args:
        inside: (w, h), the columns of a part of the image.
        x0: Its first column.
        y0: Its first row.
        height: Height of the whole image.
    """
    framed = np.zeros((inside.shape[0], inside.shape[1] + 1), dtype=bool)  # every column ends outside
    framed[:, :-1] = inside
    flat = framed.ravel()
    places = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[0]:
        places = np.append(0, places)
    column, row = np.divmod(places, framed.shape[1])
    changes = (x0 + column) * height + y0 + row  # in turn the beginning and the end of a run
    # A run that ends at the bottom of a column goes on if the next column begins inside.
    goes_on = changes[1:-1:2] == changes[2::2]
    if not goes_on.any():
        return changes
    kept = np.ones(len(changes), dtype=bool)
    kept[1:-1:2] &= ~goes_on
    kept[2::2] &= ~goes_on
    return changes[kept]
