from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmask.transfer.detection.layers.boxes import (
    cell_anchors,
    decode_boxes,
    encode_boxes,
    grid_anchors,
    match,
    sample,
)


def random_boxes(num: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=rng) * 60
    return torch.cat([corner, corner + 1 + torch.rand(num, 2, generator=rng) * 40], dim=1)


def test_anchors_have_the_asked_area_and_aspect_and_detectron2s_order() -> None:
    cells = cell_anchors((32, 64), (0.5, 1.0, 2.0))
    assert cells.shape == (6, 4)
    for row, (size, ratio) in zip(cells.tolist(), [(s, r) for s in (32, 64) for r in (0.5, 1.0, 2.0)]):
        width, height = row[2] - row[0], row[3] - row[1]
        assert width * height == pytest.approx(size**2, rel=1e-5)
        assert height / width == pytest.approx(ratio, rel=1e-5)
    anchors = grid_anchors(cells, 2, 3, 16)
    assert torch.equal(anchors[6 * 1], cells[0] + torch.tensor([16.0, 0, 16, 0]))  # next column
    assert torch.equal(anchors[6 * 3], cells[0] + torch.tensor([0.0, 16, 0, 16]))  # next row


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_decode_undoes_encode(seed: int) -> None:
    reference, target = random_boxes(8, seed), random_boxes(8, seed + 1)
    for weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)):
        assert torch.allclose(
            decode_boxes(encode_boxes(reference, target, weights), reference, weights), target, atol=1e-3
        )


def test_growth_is_limited() -> None:
    huge = decode_boxes(torch.tensor([[0.0, 0.0, 100.0, 0.0]]), torch.tensor([[0.0, 0.0, 16.0, 16.0]]), (1, 1, 1, 1))[0]
    assert float(huge[2] - huge[0]) == pytest.approx(1000.0, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(num=st.integers(1, 20), objects=st.integers(0, 4), seed=st.integers(0, 10_000), keep=st.booleans())
def test_matching_against_a_loop(num: int, objects: int, seed: int, keep: bool) -> None:
    boxes, truth = random_boxes(num, seed), random_boxes(objects, seed + 7)

    def iou(a: list[float], b: list[float]) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    table = [[iou(t, b) for b in boxes.tolist()] for t in truth.tolist()]
    index, labels = match(truth, boxes, negative_below=0.3, positive_from=0.7, keep_best=keep)
    for n in range(num):
        column = [row[n] for row in table]
        best = max(column, default=0.0)
        expected = 1 if best >= 0.7 else 0 if best < 0.3 else -1
        if keep and any(math.isclose(row[n], max(row), rel_tol=1e-6) for row in table):
            expected = 1
        assert int(labels[n]) == expected
        if column:
            assert column[int(index[n])] == pytest.approx(best, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(positives=st.integers(0, 40), negatives=st.integers(0, 40), num=st.integers(2, 32), seed=st.integers(0, 100))
def test_sampling_takes_at_most_its_share_and_fills_up(positives: int, negatives: int, num: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    first, second = sample(torch.arange(positives), torch.arange(100, 100 + negatives), num, 0.25, rng)
    assert len(first) == min(positives, int(num * 0.25))
    assert len(second) == min(negatives, num - len(first))
    assert len(set(first.tolist())) == len(first)
    assert set(second.tolist()) <= set(range(100, 100 + negatives))
