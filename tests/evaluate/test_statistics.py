from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats

from mixmask.engine.predictions import ClassPredictions, DetectionMatches
from mixmask.evaluate.average_precision import AveragePrecision, compare_detectors
from mixmask.evaluate.statistics import compare_classifiers, difference, summarize, within_noise
from mixmask.launch.demo import demo_data
from mixmask.transfer.detection.data.annotations import open_test
from mixmask.transfer.detection.data.pictures import DetectionSet, Instance, Picture
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.detection.results.coco_matches import coco_matches
from mixmask.transfer.detection.results.metrics import FoundObject, coco_metrics, voc_matches, voc_metrics


def test_words_are_plain() -> None:
    a, b = [69.3, 69.6, 68.9, 69.9, 69.2], [68.5, 68.6, 68.7, 68.8, 68.4]
    gaps = np.array(a) - np.array(b)
    found = difference(a, b, paired=True)
    assert found.value == pytest.approx(gaps.mean())
    assert found.error == pytest.approx(gaps.std(ddof=1) / 5**0.5)
    assert found.p == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    interval = f"[{found.low:.1f}, {found.high:.1f}] (paired t interval)"
    assert found.words() == f"+0.8 (SE 0.2), 5 seeds, 95 % CI {interval}, paired t-test p = {found.p:.2g}"


def test_the_intervals_are_students_and_welchs() -> None:
    a, b = [69.3, 69.6, 69.4, 69.9, 69.2], [68.5, 68.6, 68.7, 68.8, 68.4]
    found = difference(a, b, paired=True)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    found = difference(a, b[:3], paired=False)
    interval = stats.ttest_ind(a, b[:3], equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert "(Welch's t interval)" in found.words()


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 5, 10])
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_cover_what_they_say(n: int, skewed: bool) -> None:
    """95 % of normal differences; of skewed ones (a gamma distribution with skewness 0.5) at least 94 %, too."""
    generator = np.random.default_rng(n)
    repeats = 4000
    hits = 0
    samples = (generator.gamma(16.0, size=(repeats, n)) - 16) / 4 if skewed else generator.normal(size=(repeats, n))
    base = generator.normal(60.0, 5.0, size=(repeats, n))  # what the pairs have in common
    for gaps, common in zip(samples, base, strict=True):
        found = difference((common + 1 + gaps).tolist(), common.tolist(), paired=True)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert hits / repeats >= (0.935 if skewed else 0.94)


def test_few_seeds_say_so() -> None:
    assert difference([1.0], [0.5], paired=False).words() == "+0.5, 1 seed, too few seeds for an interval (at least 3)"
    two = difference([1.0, 1.2], [0.5, 0.6], paired=True)
    assert (two.low, two.error is not None) == (None, True)
    equal = difference([1.0, 1.1, 1.2, 1.3, 1.4], [0.0, 0.1, 0.2, 0.3, 0.4], paired=True)
    assert equal.p is None
    with pytest.raises(ValueError, match="cannot be compared in pairs"):
        difference([1.0, 2.0], [1.0], paired=True)
    with pytest.raises(ValueError, match="cannot be compared"):
        difference([], [1.0], paired=False)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6), st.lists(st.floats(-100, 100), min_size=2, max_size=6))
@settings(deadline=None, max_examples=30)
def test_a_difference_is_the_opposite_of_its_reverse(a: list[float], b: list[float]) -> None:
    forth, back = difference(a, b, paired=False), difference(b, a, paired=False)
    assert forth.value == pytest.approx(-back.value, abs=1e-9)
    assert forth.error == pytest.approx(back.error, abs=1e-9)
    if forth.low is not None and forth.high is not None:
        assert forth.low <= forth.value + 1e-9
        assert forth.high >= forth.value - 1e-9


def test_noise_is_welchs() -> None:
    a, b = [70.0, 70.4, 70.2], [69.9, 70.3, 70.1]
    assert within_noise(summarize(b), summarize(a)) == (stats.ttest_ind(a, b, equal_var=False).pvalue > 0.05)
    assert not within_noise(summarize([60.0, 60.1, 60.2]), summarize(a))
    assert not within_noise(summarize([70.0, 70.4]), summarize(a))  # two runs say little about their noise
    assert within_noise(summarize([60.0] * 3), summarize([60.0] * 3))
    assert not within_noise(summarize([59.0] * 3), summarize([60.0] * 3))


def test_classifiers_are_compared_image_by_image() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.random(500) < 0.8, generator.random(500) < 0.7
    found = compare_classifiers("knn/top1", first, second)
    assert found.values == (100 * first.mean(), 100 * second.mean())
    only = (int((first & ~second).sum()), int((second & ~first).sum()))
    assert found.p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    slow = []  # resampling the images themselves
    for _ in range(4000):
        drawn = generator.integers(500, size=500)
        slow.append(100 * (first[drawn].mean() - second[drawn].mean()))
    assert found.low == pytest.approx(np.quantile(slow, 0.025), abs=0.4)
    assert found.high == pytest.approx(np.quantile(slow, 0.975), abs=0.4)
    same = compare_classifiers("knn/top1", first, first)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def guesses(pictures: DetectionSet, seed: int) -> list[FoundObject]:
    """Jittered true boxes and nonsense, with scores that tie now and then."""
    generator = np.random.default_rng(seed)
    found = []
    for number, picture in enumerate(pictures.pictures):
        for instance in picture.instances:
            for _ in range(int(generator.integers(0, 3))):
                left, top, right, bottom = np.array(instance.box) + generator.normal(0, 3, 4)
                label = instance.label if generator.random() < 0.8 else int(generator.integers(len(pictures.classes)))
                box = (float(left), float(top), float(max(right, left + 2)), float(max(bottom, top + 2)))
                found.append(FoundObject(number, label, round(float(generator.random()), 2), box))
        found.append(FoundObject(number, int(generator.integers(len(pictures.classes))), 0.5, (1.0, 1.0, 20.0, 20.0)))
    return found


@pytest.fixture(scope="module")
def voc_pictures() -> DetectionSet:
    generator = np.random.default_rng(3)
    pictures = []
    for number in range(12):
        own = []
        for x, y in generator.integers(0, 120, size=(int(generator.integers(1, 5)), 2)).astype(float):
            difficult = bool(generator.random() < 0.2)
            own.append(Instance((x, y, x + 40, y + 40), int(generator.integers(3)), difficult=difficult))
        pictures.append(Picture(str(number), Path(f"{number}.jpg"), 200, 200, tuple(own)))
    return DetectionSet(tuple(pictures), ("a", "b", "c", "never"))


@pytest.fixture(scope="module")
def coco_pictures(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    root = tmp_path_factory.mktemp("coco")
    demo_data.write_coco(root, size=(96, 72), train=2, val=10, seed=4)
    recipe = {
        "protocol": "detect_coco",
        "data": {"name": "c", "root": str(root), "train": ["train2017"], "test": ["val2017"]},
        "batch_size": 2,
        "lr": 0.01,
        "iterations": 1,
        "milestones": [],
        "warmup_iterations": 0,
        "min_size_train": [64],
        "engine": "torchvision",
    }
    return open_test(DetectRecipe.model_validate(recipe))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_image_once_gives_the_metrics_of_the_record(
    voc_pictures: DetectionSet, coco_pictures: DetectionSet, seed: int
) -> None:
    cases = [
        (
            voc_matches(guesses(voc_pictures, seed), voc_pictures),
            voc_metrics(guesses(voc_pictures, seed), voc_pictures),
        ),
        (
            coco_matches(guesses(coco_pictures, seed), coco_pictures, "bbox"),
            coco_metrics(guesses(coco_pictures, seed), coco_pictures, ("bbox",)),
        ),
    ]
    for matches, metrics in cases:
        once = np.ones(len(matches.objects))
        assert AveragePrecision(matches)(once) == pytest.approx(metrics["bbox/AP"], abs=1e-9)
        assert AveragePrecision(matches, 0.5)(once) == pytest.approx(metrics["bbox/AP50"], abs=1e-9)
        assert AveragePrecision(matches, 0.75)(once) == pytest.approx(metrics["bbox/AP75"], abs=1e-9)
        assert 0 < metrics["bbox/AP50"] < 100


def repeated(
    pictures: DetectionSet, found: list[FoundObject], drawn: np.ndarray
) -> tuple[DetectionSet, list[FoundObject]]:
    """The resampled data set itself: every picture as often as it was drawn, each time as another picture."""
    copies = [number for number, times in enumerate(drawn.astype(int)) for _ in range(times)]
    shown = tuple(
        Picture(str(1000 + n), pictures.pictures[number].path, 200, 200, pictures.pictures[number].instances)
        for n, number in enumerate(copies)
    )
    own = [
        FoundObject(n, one.label, one.score, one.box)
        for n, number in enumerate(copies)
        for one in found
        if one.picture == number
    ]
    return DetectionSet(shown, pictures.classes), own


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_of_voc_is_a_data_set_with_repeated_pictures(voc_pictures: DetectionSet, seed: int) -> None:
    found = guesses(voc_pictures, seed)
    drawn = np.bincount(np.random.default_rng(seed).integers(12, size=12), minlength=12).astype(np.float64)
    # scores that differ in the third decimal: the order of ties is numpy's own business
    distinct = [FoundObject(d.picture, d.label, (n * 7 % 997) / 1000, d.box) for n, d in enumerate(found)]
    pictures, own = repeated(voc_pictures, distinct, drawn)
    ours = AveragePrecision(voc_matches(distinct, voc_pictures))(drawn)
    assert ours == pytest.approx(voc_metrics(own, pictures)["bbox/AP"], abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_of_coco_is_what_cocoeval_makes_of_repeated_pictures(
    coco_pictures: DetectionSet, tmp_path: Path, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    spread = [  # scores without ties: their order among copies is COCOeval's own business
        FoundObject(one.picture, one.label, one.score + n * 1e-6, one.box)
        for n, one in enumerate(guesses(coco_pictures, seed))
    ]
    num = len(coco_pictures)
    drawn = np.bincount(generator.integers(num, size=num), minlength=num).astype(np.float64)
    document = json.loads(coco_pictures.source[0].read_text())
    images, annotations, rows = [], [], []
    for number, times in enumerate(drawn.astype(int)):
        key = int(coco_pictures.pictures[number].key)
        for copy in range(times):
            new = 1 + len(images)
            images.append({**next(image for image in document["images"] if image["id"] == key), "id": new})
            for one in document["annotations"]:
                if one["image_id"] == key:
                    annotations.append({**one, "id": 1 + len(annotations), "image_id": new})
            for one in (d for d in spread if d.picture == number):
                left, top, right, bottom = one.box
                category = coco_pictures.category_ids[one.label]
                rows.append({"image_id": new, "category_id": category, "score": one.score - copy * 1e-12,
                             "bbox": [left, top, right - left, bottom - top]})  # fmt: skip
    truth = COCO()
    truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": document["categories"]}
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ours = AveragePrecision(coco_matches(spread, coco_pictures, "bbox"))(drawn)
    assert ours == pytest.approx(100 * evaluation.stats[0], abs=1e-6)


def test_detectors_are_compared_on_the_same_resamples(voc_pictures: DetectionSet) -> None:
    good, bad = (voc_matches(guesses(voc_pictures, 0), voc_pictures), voc_matches([], voc_pictures))
    same = compare_detectors("bbox/AP50", good, good)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    better = compare_detectors("bbox/AP50", good, bad)
    assert better.values[1] == 0.0
    assert 0 < better.low <= better.value <= better.high
    assert "over 12 images" in better.words()


def test_files_of_predictions_come_back(voc_pictures: DetectionSet, tmp_path: Path) -> None:
    answers = ClassPredictions("abc", np.arange(5), np.array([0, 1, 1, 3, 0]))
    answers.write(tmp_path / "predictions.npz")
    back = ClassPredictions.read(tmp_path / "predictions.npz")
    assert back.images == "abc"
    assert (back.labels == answers.labels).all()
    assert (back.predicted == answers.predicted).all()
    matches = voc_matches(guesses(voc_pictures, 0), voc_pictures)
    matches.write(tmp_path / "matches.npz")
    again = DetectionMatches.read(tmp_path / "matches.npz")
    assert all(np.array_equal(vars(matches)[name], vars(again)[name]) for name in vars(matches))
