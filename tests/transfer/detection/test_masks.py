"""Masks: polygons to grids for training, probabilities to run lengths for results."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mixmask.transfer.detection.layers.roi_heads import rasterise
from mixmask.transfer.detection.results.masks import encode_mask


def test_masks_are_drawn_in_their_box_and_pasted_back() -> None:
    box = [10.0, 20.0, 50.0, 40.0]
    left_half = [[10.0, 20.0, 30.0, 20.0, 30.0, 40.0, 10.0, 40.0]]
    drawn = rasterise(left_half, box, 14)
    assert drawn[:, :7].all()
    assert not drawn[:, 7:].any()
    pasted = coco_mask.decode(encode_mask(drawn.astype(np.float32), (10.0, 20.0, 50.0, 40.0), 60, 80))
    assert pasted[20:40, 10:29].all()
    assert not pasted[:, 31:].any()
    assert not pasted[:20].any()
    assert not pasted[40:].any()
    assert not coco_mask.decode(
        encode_mask(np.ones((14, 14), dtype=np.float32), (70.0, 10.0, 70.0, 20.0), 60, 80)
    ).any()


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.integers(-40, 360).map(lambda eighths: eighths / 8)] * 4),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 999),
    st.booleans(),
)
def test_masks_are_encoded_as_a_drawn_image_would_be(
    corners: tuple[float, float, float, float], size: tuple[int, int], seed: int, full: bool
) -> None:
    """Pixel by pixel, by the definition of bilinear sampling with zeros outside; then pycocotools' own code."""
    height, width = size
    left, right = sorted(min(max(v, 0.0), width) for v in corners[:2])
    top, bottom = sorted(min(max(v, 0.0), height) for v in corners[2:])
    if full:
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    mask = torch.ones(5, 5) if full else torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
    drawn = np.zeros((height, width), dtype=np.uint8)
    if right > left and bottom > top:
        where = [(x, y) for x in range(width) for y in range(height)]
        grid = torch.tensor(
            [[(x + 0.5 - left) / (right - left) * 2 - 1, (y + 0.5 - top) / (bottom - top) * 2 - 1] for x, y in where]
        )
        values = torch.nn.functional.grid_sample(mask[None, None], grid[None, None], align_corners=False)[0, 0, 0]
        for (x, y), value in zip(where, values.tolist(), strict=True):
            drawn[y, x] = value >= 0.5
    found = encode_mask(mask.numpy(), (left, top, right, bottom), height, width)
    assert (coco_mask.decode(found) != drawn).sum() <= 2  # a value at the threshold may be rounded to either side
    assert found == coco_mask.encode(np.asfortranarray(coco_mask.decode(found)))
