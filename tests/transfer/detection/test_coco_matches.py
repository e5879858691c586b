"""Matches by COCO's rules against pycocotools' own, and the two backends against each other."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from mixmask.evaluate.average_precision import AveragePrecision
from mixmask.transfer.detection.data.pictures import DetectionSet, Picture
from mixmask.transfer.detection.results import metrics
from mixmask.transfer.detection.results.coco_matches import coco_matches
from mixmask.transfer.detection.results.metrics import SHAPES, FoundObject, coco_metrics, coco_shape, coco_truth

HEIGHT, WIDTH = 60, 80


def random_set(seed: int, folder: Path) -> tuple[DetectionSet, list[FoundObject]]:
    """Pictures with objects, crowds among them, and detections near them, beside them, and with equal scores."""
    rng = np.random.default_rng(seed)
    keys = rng.permutation(np.arange(1, 8)).tolist()
    annotations: list[dict[str, Any]] = []
    found: list[FoundObject] = []

    def box() -> tuple[float, float, float, float]:
        left, top = rng.uniform(0, WIDTH - 12), rng.uniform(0, HEIGHT - 12)
        return left, top, rng.uniform(left + 4, WIDTH), rng.uniform(top + 4, HEIGHT)

    def outline(left: float, top: float, right: float, bottom: float) -> list[float]:
        return [left, top, right, top, right, bottom, (left + right) / 2, bottom, left, (top + bottom) / 2]

    for place, key in enumerate(keys):
        near = []
        for _ in range(rng.integers(0, 5)):
            left, top, right, bottom = box()
            category = int(rng.choice([3, 5, 9]))
            near.append((left, top, right, bottom, category))
            crowd = int(rng.random() < 0.2)
            polygon = outline(left, top, right, bottom)
            code = coco_mask.frPyObjects([polygon], HEIGHT, WIDTH)[0]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": key, "category_id": category, "iscrowd": crowd,
                    "bbox": [left, top, right - left, bottom - top], "area": float(coco_mask.area(code)),
                    "segmentation": {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()} if crowd else [polygon],
                }
            )  # fmt: skip
        for _ in range(rng.integers(0, 12)):
            left, top, right, bottom = box()
            category = int(rng.choice([3, 5, 9]))
            if near and rng.random() < 0.7:
                left, top, right, bottom, category = near[rng.integers(len(near))]
                left, top = left + rng.uniform(0, 2), top + rng.uniform(0, 2)
            mask = coco_mask.frPyObjects([outline(left, top, right, bottom)], HEIGHT, WIDTH)[0]
            score = round(float(rng.random()), 1)
            found.append(FoundObject(place, [3, 5, 9].index(category), score, (left, top, right, bottom), mask))
    document = {
        "images": [{"id": key, "width": WIDTH, "height": HEIGHT, "file_name": f"{key}.jpg"} for key in keys],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in ((3, "a"), (5, "b"), (9, "c"))],
    }
    file = folder / f"{seed}.json"
    file.write_text(json.dumps(document))
    pictures = tuple(Picture(str(key), folder / f"{key}.jpg", WIDTH, HEIGHT, ()) for key in keys)
    return DetectionSet(pictures, ("a", "b", "c"), (file,), (3, 5, 9)), found


def rows_of(pictures: DetectionSet, found: list[FoundObject], kind: str) -> list[dict[str, Any]]:
    """As in COCO's result files."""
    return [
        {
            "image_id": int(pictures.pictures[one.picture].key),
            "category_id": pictures.category_ids[one.label],
            "score": one.score,
            SHAPES[kind]: coco_shape(one, kind),
        }
        for one in found
    ]


def theirs(pictures: DetectionSet, found: list[FoundObject], kind: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_truth(pictures)
        evaluation = COCOeval(truth, truth.loadRes(rows_of(pictures, found, kind)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["bbox", "segm"]))
def test_the_matches_are_pycocotools_own(seed: int, kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    pictures, found = random_set(seed, tmp_path_factory.mktemp("coco"))
    if not found:
        return
    evaluation = theirs(pictures, found, kind)
    matches = coco_matches(found, pictures, kind)
    numbers = {int(picture.key): place for place, picture in enumerate(pictures.pictures)}
    whole = evaluation.params.areaRng[0]
    for label, category in enumerate((3, 5, 9)):
        ones = [one for one in evaluation.evalImgs if one and one["category_id"] == category and one["aRng"] == whole]
        scores = np.concatenate([np.zeros(0), *(one["dtScores"] for one in ones)])
        order = np.argsort(-scores, kind="mergesort")
        none = np.zeros((10, 0))
        taken = np.concatenate([none, *(one["dtMatches"] for one in ones)], axis=1)[:, order] != 0
        ignored = np.concatenate([none, *(one["dtIgnore"] for one in ones)], axis=1)[:, order] != 0
        images = np.concatenate([[], *([numbers[one["image_id"]]] * len(one["dtScores"]) for one in ones)])[order]
        mine = matches.label == label
        assert matches.image[mine].tolist() == images.tolist()
        assert np.array_equal(matches.found[:, mine], taken & ~ignored)
        assert np.array_equal(matches.ignored[:, mine], ignored)
        for one in ones:
            counted = int((np.asarray(one["gtIgnore"]) == 0).sum())
            assert matches.objects[numbers[one["image_id"]], label] == counted
    if evaluation.stats[0] >= 0:
        assert AveragePrecision(matches)(np.ones(len(pictures))) == pytest.approx(100 * evaluation.stats[0], abs=1e-9)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_both_backends_give_the_same_statistics(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    pictures, found = random_set(seed, tmp_path_factory.mktemp("coco"))
    if not found:
        return
    for kind in ("bbox", "segm"):
        evaluation = theirs(pictures, found, kind)
        stats, precision = metrics._coco_evaluation(found, pictures, ("bbox", "segm"))[kind]
        # The same matches, summed in another order: the last bit of a mean may differ.
        np.testing.assert_allclose(stats, evaluation.stats, rtol=0, atol=1e-15)
        np.testing.assert_allclose(precision, evaluation.eval["precision"], rtol=0, atol=1e-15)


def test_without_the_faster_backend_pycocotools_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, found = random_set(5, tmp_path)
    other = coco_metrics(found, pictures, ("bbox", "segm"))
    monkeypatch.setattr(metrics, "coco_backend", lambda: "pycocotools")
    slow = coco_metrics(found, pictures, ("bbox", "segm"))
    assert slow.keys() == other.keys()
    assert slow == pytest.approx(other, abs=1e-12)


def test_many_masks_are_no_trouble(tmp_path: Path) -> None:
    """pycocotools gives the areas of at most 255 masks at once."""
    pictures, found = random_set(5, tmp_path)
    many = [*found, *(FoundObject(one.picture, one.label, 0.01, one.box, one.mask) for one in found * 60)]
    assert len(many) > 700
    evaluation = theirs(pictures, many, "segm")
    np.testing.assert_allclose(
        metrics._coco_evaluation(many, pictures, ["segm"])["segm"][0], evaluation.stats, rtol=0, atol=1e-15
    )
