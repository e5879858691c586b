"""Hits, misses and false alarms of a picture, against matching by trying everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmask.transfer.detection.data.pictures import Instance
from mixmask.transfer.detection.results.metrics import FoundObject
from mixmask.transfer.detection.results.outcomes import iou, outcomes


def true(box: tuple[float, float, float, float], label: int = 0, **more: bool) -> Instance:
    return Instance(label=label, box=box, **more)


def found(box: tuple[float, float, float, float], score: float, label: int = 0) -> FoundObject:
    return FoundObject(picture=0, label=label, score=score, box=box)


A, B, C = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (0.0, 4.0, 10.0, 14.0)


def test_every_outcome() -> None:
    detections = [found(A, 0.6), found(A, 0.9), found(B, 0.8, label=1), found(C, 0.7)]
    of_found, of_true = outcomes(detections, [true(A), true(B), true(C, difficult=True)])
    # The second detection of A is a false alarm, B was taken for another class, and what is difficult is not counted.
    assert of_found == ["false alarm", "hit", "false alarm", "not counted"]
    assert of_true == ["hit", "missed", "not counted"]
    assert outcomes([], [true(A)]) == ([], ["missed"])
    assert outcomes([found(A, 1.0)], []) == (["false alarm"], [])


def test_an_object_inside_a_crowd_is_a_hit() -> None:
    assert outcomes([found(A, 0.9)], [true(A, crowd=True), true(A)]) == (["hit"], ["not counted", "hit"])


BOXES = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 6)] * 2).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)


@given(
    st.lists(st.tuples(BOXES, st.integers(0, 1)), max_size=6), st.lists(st.tuples(BOXES, st.integers(0, 1)), max_size=6)
)
def test_numbers_fit_together(detected: list[tuple], there: list[tuple]) -> None:
    detections = [found(box, 1 - n / 10, label) for n, (box, label) in enumerate(detected)]
    of_found, of_true = outcomes(detections, [true(box, label) for box, label in there])
    assert of_found.count("hit") == of_true.count("hit")
    for detection, outcome in zip(detections, of_found, strict=True):
        covers = any(iou(detection.box, box) >= 0.5 and label == detection.label for box, label in there)
        assert outcome == "false alarm" or covers
    best = next(iter(detections), None)
    if best is not None and any(iou(best.box, box) >= 0.5 and label == best.label for box, label in there):
        assert of_found[0] == "hit"


@given(BOXES, BOXES)
def test_iou_by_counting_cells(one: tuple, other: tuple) -> None:
    def cells(box: tuple) -> set[tuple[int, int]]:
        return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}

    assert iou(one, other) == pytest.approx(len(cells(one) & cells(other)) / len(cells(one) | cells(other)))
