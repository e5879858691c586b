from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixmask.transfer.detection.data.annotations import open_test
from mixmask.transfer.detection.data.pictures import DetectionSet, Instance, Picture
from mixmask.transfer.detection.results.metrics import (
    FoundObject,
    coco_metrics,
    voc_class_ap,
    voc_metrics,
)
from mixmask.transfer.scores import eleven_point_ap
from tests.transfer.detection.small_recipes import COCO, recipe_of


def picture(number: int, *instances: Instance) -> Picture:
    return Picture(str(number), Path(f"{number}.jpg"), 200, 200, instances)


def box(left: float, top: float, side: float = 20, label: int = 0, difficult: bool = False) -> Instance:
    return Instance((left, top, left + side, top + side), label, difficult=difficult)


def found(number: int, score: float, left: float, top: float, side: float = 20, label: int = 0) -> FoundObject:
    return FoundObject(number, label, score, (left, top, left + side, top + side))


def test_eleven_points_by_hand() -> None:
    # Three of four objects found: hit, miss, hit, hit gives recall .25 .25 .5 .75 and precision 1 1/2 2/3 3/4.
    recall, precision = np.array([0.25, 0.25, 0.5, 0.75]), np.array([1.0, 0.5, 2 / 3, 0.75])
    # recalls 0, .1, .2 -> 1; .3 … .7 -> 3/4; .8, .9, 1 -> 0
    assert eleven_point_ap(recall, precision) == pytest.approx((3 * 1 + 5 * 0.75) / 11)
    assert eleven_point_ap(np.array([]), np.array([])) == 0.0


def test_ap_by_hand_with_a_duplicate_and_a_difficult_object() -> None:
    truth = DetectionSet(
        (picture(0, box(10, 10), box(100, 100)), picture(1, box(50, 50), box(120, 20, difficult=True))), ("a",)
    )
    detections = [
        found(0, 0.9, 10, 10),  # hit
        found(0, 0.8, 10, 10),  # the same object again: a miss
        found(1, 0.7, 120, 20),  # the difficult object: counts neither way
        found(1, 0.6, 50, 50),  # hit
        found(1, 0.5, 150, 150),  # nothing there: a miss
    ]
    # Three objects count. Precision 1, 1/2, 1/2, 2/3, 1/2 and recall 1/3, 1/3, 1/3, 2/3, 2/3.
    # Recalls 0 … .3 -> 1 (4 levels); .4, .5, .6 -> 2/3 (3 levels); .7 … 1 -> 0.
    expected = 100 * (4 * 1 + 3 * 2 / 3) / 11
    metrics = voc_metrics(detections, truth)
    assert metrics["bbox/AP50"] == pytest.approx(expected)
    assert metrics["bbox/AP"] == pytest.approx(expected)  # every hit is exact, so all ten overlaps agree
    assert metrics["bbox/AP50/a"] == pytest.approx(expected)


def test_overlap_counts_inclusive_pixels() -> None:
    """A 3-pixel box shifted by one: 2·3 of 3·4 pixels are shared (IoU 0.5), which is not above 0.5."""
    truth = {0: (np.array([[1.0, 1.0, 3.0, 3.0]]), np.array([False]))}
    shifted = [FoundObject(0, 0, 1.0, (1.0, 0.0, 4.0, 3.0))]
    assert voc_class_ap(shifted, truth, 0.5) == 0.0
    assert voc_class_ap(shifted, truth, 0.49) == pytest.approx(1.0)


def test_classes_without_counted_objects_count_as_zero() -> None:
    truth = DetectionSet((picture(0, box(10, 10), box(60, 60, label=1, difficult=True)),), ("a", "b", "c"))
    metrics = voc_metrics([found(0, 0.9, 10, 10), found(0, 0.9, 150, 150, label=2)], truth)
    assert metrics["bbox/AP50/a"] == pytest.approx(100.0)
    assert metrics["bbox/AP50/b"] == metrics["bbox/AP50/c"] == 0.0
    assert metrics["bbox/AP50"] == pytest.approx(100.0 / 3)
    assert truth.uncounted_classes() == ["b", "c"]


def test_order_of_detections_does_not_matter() -> None:
    truth = DetectionSet((picture(0, box(10, 10), box(100, 100), box(60, 10)),), ("a",))
    detections = [found(0, 0.9, 12, 10), found(0, 0.5, 100, 101), found(0, 0.7, 5, 150), found(0, 0.3, 60, 14)]
    assert voc_metrics(detections, truth) == voc_metrics(detections[::-1], truth)


def test_no_detections_is_zero() -> None:
    truth = DetectionSet((picture(0, box(10, 10)),), ("a",))
    assert voc_metrics([], truth)["bbox/AP"] == 0.0


def test_coco_metrics_of_the_truth_are_perfect(coco: Path, tmp_path: Path) -> None:
    from pycocotools import mask as coco_mask

    truth = open_test(recipe_of(COCO, coco, tmp_path))
    detections = []
    for number, item in enumerate(truth.pictures):
        for instance in item.instances:
            outline = [list(polygon) for polygon in instance.polygons]
            mask = coco_mask.merge(coco_mask.frPyObjects(outline, item.height, item.width))
            detections.append(FoundObject(number, instance.label, 0.9, instance.box, mask))
    metrics = coco_metrics(detections, truth, ("bbox", "segm"))
    for name in ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50"):
        assert metrics[name] == pytest.approx(100.0), name
    assert coco_metrics([], truth, ("bbox", "segm")) == {
        f"{k}/{n}": 0.0 for k in ("bbox", "segm") for n in ("AP", "AP50", "AP75")
    }
