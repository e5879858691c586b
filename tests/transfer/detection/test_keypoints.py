"""Keypoints: cells of the head's grid, the metric, views of the pictures, runs, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from mixmask.engine.backbones import load_backbone
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.predictions import MATCHES, DetectionMatches
from mixmask.engine.randomness import generator
from mixmask.evaluate.average_precision import AveragePrecision
from mixmask.transfer import stage
from mixmask.transfer.detection.commands import show_detections
from mixmask.transfer.detection.data.annotations import open_detection
from mixmask.transfer.detection.data.batches import _Training, training_batches
from mixmask.transfer.detection.data.keypoints import read_keypoints
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.detector import Targets
from mixmask.transfer.detection.detectors.keypoints import KeypointRecipe
from mixmask.transfer.detection.layers.keypoints import KeypointHead, keypoint_loss, most_likely_places, to_cells
from mixmask.transfer.detection.results import metrics
from mixmask.transfer.detection.results.coco_matches import coco_matches, keypoint_similarity
from mixmask.transfer.detection.results.metrics import FoundObject, coco_metrics, coco_truth
from mixmask.transfer.detection.results.predictions import NAME, load_detections, save_detections
from tests.transfer.detection.keypoint_sets import KEYPOINTS, NAMES, SIGMAS, persons, random_finds, write_keypoints
from tests.transfer.detection.small_recipes import VOC, plan, recipe_of, with_detector
from tests.transfer.detection.test_coco_matches import rows_of
from tests.transfer.detection.test_engines import ENGINES

__all__ = ["persons"]

PERSON = {
    "name": "person",
    "keypoints": ["nose", "left_eye", "right_eye", "Left ear", "Right ear", "left_hand"],
    "skeleton": [[1, 2]],
}


def random_boxes(number: int, rng: torch.Generator) -> Tensor:
    corner, extent = torch.rand(number, 2, generator=rng) * 40, torch.rand(number, 2, generator=rng) * 60 + 3
    return torch.cat([corner, corner + extent], dim=1)


@settings(max_examples=50, deadline=None)
@given(number=st.integers(0, 6), size=st.integers(2, 56), seed=st.integers(0, 10**6))
def test_a_keypoint_is_in_the_cell_of_its_place(number: int, size: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    boxes = random_boxes(number, rng)
    share = torch.rand(number, 4, 2, generator=rng) * 1.4 - 0.2
    share[:, 0] = torch.randint(0, 2, (number, 2), generator=rng)  # a corner of the box
    flags = torch.randint(0, 3, (number, 4, 1), generator=rng)
    places = boxes[:, None, :2] + share * (boxes[:, 2:] - boxes[:, :2])[:, None]
    places[:, 0] = torch.where(share[:, 0] == 1, boxes[:, 2:], boxes[:, :2])
    cells, counted = to_cells(torch.cat([places, flags], dim=2), boxes, size)
    assert cells.shape == counted.shape == (number, 4)
    for row in range(number):
        for point in range(4):
            x, y = share[row, point].tolist()
            within = 0 <= x <= 1 and 0 <= y <= 1
            assert bool(counted[row, point]) == (within and flags[row, point].item() > 0)
            if counted[row, point] and point:
                column, line = int(cells[row, point]) % size, int(cells[row, point]) // size
                assert column == pytest.approx(x * size - 0.5, abs=0.51)
                assert line == pytest.approx(y * size - 0.5, abs=0.51)
            if counted[row, point] and not point:
                assert int(cells[row, 0]) == int(y) * (size - 1) * size + int(x) * (size - 1)


def test_the_loss_is_a_mean_over_the_labelled_keypoints() -> None:
    rng = torch.Generator().manual_seed(1)
    boxes = random_boxes(5, rng)
    points = torch.rand(5, 3, 3, generator=rng)
    points[..., :2] = boxes[:, None, :2] + points[..., :2] * 1.2 * (boxes[:, 2:] - boxes[:, :2])[:, None]
    points[..., 2] = torch.randint(0, 3, (5, 3), generator=rng)
    logits = torch.randn(5, 3, 8, 8, generator=rng, dtype=torch.float64)
    cells, counted = to_cells(points, boxes, 8)
    terms = [
        -float(logits[row, point].flatten().log_softmax(0)[cells[row, point]])
        for row in range(5)
        for point in range(3)
        if counted[row, point]
    ]
    assert len(terms) > 4
    assert float(keypoint_loss(logits, boxes, points)) == pytest.approx(np.mean(terms))


def test_without_a_labelled_keypoint_the_loss_is_zero_and_has_a_gradient() -> None:
    head = KeypointHead(4, [8], 3)
    for number in (0, 2):
        head.zero_grad()
        logits = head(torch.randn(number, 4, 7, 7))
        assert logits.shape == (number, 3, 28, 28)
        loss = keypoint_loss(logits, torch.tensor([[0.0, 0, 9, 9]] * number).reshape(-1, 4), torch.zeros(number, 3, 3))
        loss.backward()
        assert float(loss.detach()) == 0
        assert all(parameter.grad is not None for parameter in head.parameters())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_map_with_a_hill_gives_its_place_back(seed: int) -> None:
    """From a keypoint to its cell, a map with a hill there, and back: within a cell."""
    rng = torch.Generator().manual_seed(seed)
    boxes = random_boxes(4, rng)
    boxes[:, 2:] += 20
    extent = (boxes[:, 2:] - boxes[:, :2])[:, None]
    places = boxes[:, None, :2] + torch.rand(4, 2, 2, generator=rng) * extent
    cells, counted = to_cells(torch.cat([places, torch.ones(4, 2, 1)], dim=2), boxes, 14)
    assert counted.all()
    line, column = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
    away = (line - (cells // 14)[..., None, None]) ** 2 + (column - (cells % 14)[..., None, None]) ** 2
    found = most_likely_places(-away.float(), boxes)
    assert ((found[..., :2] - places).abs() <= extent / 14 + 1).all()
    assert ((found[..., 2] > 0.2) & (found[..., 2] < 0.8)).all()


def test_no_boxes_have_no_keypoints() -> None:
    assert most_likely_places(torch.zeros(0, 5, 14, 14), torch.zeros(0, 4)).shape == (0, 5, 3)


# --- data ------------------------------------------------------------------------------------------------------------


def test_left_and_right_change_places_in_a_mirror() -> None:
    keypoints = read_keypoints([PERSON], Path("x.json"), [0.1] * 6)
    assert keypoints.mirrored == [0, 2, 1, 4, 3, 5]  # no right hand: it stays
    assert keypoints.pairs == [("left_eye", "right_eye"), ("Left ear", "Right ear")]
    assert keypoints.skeleton == ((0, 1),)


def test_keypoints_move_with_the_picture(persons: Path, tmp_path: Path) -> None:
    recipe = recipe_of(KEYPOINTS, persons, tmp_path)
    train, _ = open_detection(recipe)
    views = _Training(train, recipe, 0)
    turned = set()
    for index in range(len(train)):
        picture = train.pictures[index]
        views_of = [views[(step, index)] for step in range(6)]
        for pixels, target in views_of:
            assert target.keypoints is not None
            assert target.keypoints.shape == (len(target.boxes), 5, 3)
            width = pixels.shape[2]
            scale = width / picture.width
            for instance, points in zip(picture.instances, target.keypoints, strict=True):
                assert instance.keypoints is not None
                wanted = instance.keypoints * [scale, pixels.shape[1] / picture.height, 1]
                wanted[instance.keypoints[:, 2] == 0] = 0
                other = wanted[[0, 2, 1, 3, 4]]
                other[other[:, 2] > 0, 0] = width - other[other[:, 2] > 0, 0]
                straight, mirrored = (np.allclose(points, one, atol=1e-3) for one in (wanted, other))
                assert straight or mirrored
                turned |= {mirrored} if straight != mirrored else set()
    assert turned == {True, False}


def test_pictures_without_a_labelled_keypoint_are_not_trained_on(coco: Path, tmp_path: Path) -> None:
    root = write_keypoints(coco, tmp_path / "coco", crowd=True)
    file = root / "annotations" / "person_keypoints_train2017.json"
    document = json.loads(file.read_text())
    first = document["images"][0]["id"]
    for item in document["annotations"]:
        if item["image_id"] == first:
            item["keypoints"], item["num_keypoints"] = [0] * 15, 0
    file.write_text(json.dumps(document))
    train, _ = open_detection(recipe_of(KEYPOINTS, root, tmp_path))
    labelled = {item["image_id"] for item in document["annotations"] if item["num_keypoints"]}
    assert {int(picture.key) for picture in train.pictures} == labelled
    assert first not in labelled
    assert not any(instance.crowd for picture in train.pictures for instance in picture.instances)
    assert train.keypoints is not None
    assert train.keypoints.names == tuple(NAMES)


def set_first(**values: Any) -> Callable[[Any], None]:
    return lambda document: document["annotations"][0].update(values)


def set_category(**values: Any) -> Callable[[Any], None]:
    return lambda document: document["categories"][0].update(values)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_first(keypoints=[1, 2, 2]), r"annotation 1: keypoints is \[1, 2, 2\]; 5 times x, y, 0 … 2 is valid"),
        (set_first(keypoints=None), r"annotation 1: keypoints is None"),
        (set_first(keypoints=["a"] * 15), r"5 times x, y"),
        (set_first(keypoints=[1, 1, 3] * 5), r"has the flags \[3, 3, 3, 3, 3\]; 0, 1 and 2 are valid"),
        (set_first(keypoints=[9999, 1, 2] * 5), r"one of its keypoints lies far outside its image of"),
        (set_first(keypoints=[1, 1, 2] * 5, num_keypoints=3), r"num_keypoints is 3, labelled are 5"),
        (set_category(keypoints=None), r"category 'person': keypoints is None; a list of names is valid"),
        (set_category(keypoints=["a", "a", "b", "c", "d"]), r"several keypoints have the same name"),
        (set_category(keypoints=["a", "b"]), r"has 2 keypoints \(a, b\), detector\.oks_sigmas 5 values"),
        (set_category(skeleton=[[0, 1]]), r"skeleton is \[\[0, 1\]\]; pairs of numbers from 1 to 5 are valid"),
        (
            lambda document: document["categories"].append({"id": 2, "name": "cat", "keypoints": [*"abcde"]}),
            r"category 'cat' has other keypoints than 'person'",
        ),
    ],
)
def test_annotations_that_cannot_be_meant_are_refused(
    change: Callable[[Any], None], problem: str, persons: Path, tmp_path: Path
) -> None:
    root = tmp_path / "coco"
    shutil.copytree(persons, root, symlinks=True)
    file = root / "annotations" / "person_keypoints_train2017.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=problem):
        open_detection(recipe_of(KEYPOINTS, root, tmp_path))


def test_test_objects_need_their_number_of_keypoints(persons: Path, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    shutil.copytree(persons, root, symlinks=True)
    file = root / "annotations" / "person_keypoints_val2017.json"
    document = json.loads(file.read_text())
    del document["annotations"][0]["num_keypoints"]
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match="annotation 1 has no num_keypoints, which COCO's evaluation needs"):
        open_detection(recipe_of(KEYPOINTS, root, tmp_path))


def test_what_has_no_keypoints_is_refused(voc: Path, coco: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="VOC has no keypoints; protocol: detect_coco has"):
        recipe_of(with_detector(VOC, "detector: {kind: keypoints}"), voc, tmp_path)
    with pytest.raises(DataError, match=r"person_keypoints_train2017\.json: no such annotation file"):
        open_detection(recipe_of(KEYPOINTS, coco, tmp_path))


def test_cocos_own_sigmas_are_the_default() -> None:
    assert len(KeypointRecipe().sigmas) == 17
    assert KeypointRecipe().sigmas[:3] == (0.026, 0.025, 0.025)


# --- the metric ------------------------------------------------------------------------------------------------------


def theirs(pictures: DetectionSet, found: list[FoundObject]) -> COCOeval:
    both = zip(rows_of(pictures, found, "keypoints"), rows_of(pictures, found, "bbox"), strict=True)
    rows = [{**points, **boxes} for points, boxes in both]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_truth(pictures)
        evaluation = COCOeval(truth, truth.loadRes(rows), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(SIGMAS)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(6))
def test_similarities_matches_and_statistics_are_pycocotools_own(seed: int, coco: Path, tmp_path: Path) -> None:
    root = write_keypoints(coco, tmp_path / "coco", crowd=True)
    _, pictures = open_detection(recipe_of(KEYPOINTS, root, tmp_path))
    found = random_finds(pictures, seed)
    judge = theirs(pictures, found)
    for (image, category), similarities in judge.ious.items():
        if len(similarities):
            items = [judge.cocoGt.anns[one["id"]] for one in judge._gts[image, category]]
            best = sorted(judge._dts[image, category], key=lambda one: -one["score"])[:20]
            points = np.array([one["keypoints"] for one in best]).reshape(len(best), -1, 3)
            mine = np.stack([keypoint_similarity(points, item, SIGMAS) for item in items], axis=1)
            np.testing.assert_allclose(mine, similarities, rtol=1e-9, atol=1e-12)
    assert 0 < judge.stats[0] < 1
    ours = coco_metrics(found, pictures, ("keypoints",))
    for name, value in zip(("AP", "AP50", "AP75", "APm", "APl"), judge.stats, strict=False):
        if value >= 0:
            assert ours[f"keypoints/{name}"] == pytest.approx(100 * value, abs=1e-9)
    assert "keypoints/APs" not in ours
    matches = coco_matches(found, pictures, "keypoints")
    assert AveragePrecision(matches)(np.ones(len(pictures))) == pytest.approx(100 * judge.stats[0], abs=1e-9)
    per_image = [one for one in judge.evalImgs if one and one["aRng"] == judge.params.areaRng[0]]
    counted = {one["image_id"]: int((np.asarray(one["gtIgnore"]) == 0).sum()) for one in per_image}
    assert {int(p.key): int(n) for p, n in zip(pictures.pictures, matches.objects[:, 0], strict=True) if n} == {
        image: number for image, number in counted.items() if number
    }


def test_both_backends_give_the_same_statistics(persons: Path, tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    _, pictures = open_detection(recipe_of(KEYPOINTS, persons, tmp_path))
    found = random_finds(pictures, 3)
    stats, _ = metrics._coco_evaluation(found, pictures, ["bbox", "keypoints"])["keypoints"]
    np.testing.assert_allclose(stats, theirs(pictures, found).stats, rtol=0, atol=1e-15)


def test_pictures_without_boxes_leave_every_parameter_a_gradient(persons: Path, tmp_path: Path, resnet18: Path) -> None:
    state, info = load_backbone(resnet18)
    detector = recipe_of(KEYPOINTS, persons, tmp_path).detector
    model = detector.build(info.recipe, state, 1, masks=False).train()
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [], torch.zeros(0, 5, 3))
    images = [torch.randint(0, 256, (3, 64, 90), dtype=torch.uint8) for _ in range(2)]
    losses = model.losses(images, [none, none], [generator(0, 1), generator(0, 2)])
    torch.stack([*losses.values()]).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_measures_boxes_and_keypoints(engine: str, persons: Path, tmp_path: Path, resnet18: Path) -> None:
    ready = plan(KEYPOINTS, persons, tmp_path, resnet18, f"engine={engine}", "save_detector=true", "iterations=3")
    record = stage.run(ready)
    assert record.protocol == "detect_coco_keypoints"
    assert record.title == "detection Keypoint R-CNN"
    assert list(record.headlines) == [f"{k}/{n}" for k in ("bbox", "keypoints") for n in ("AP", "AP50", "AP75")]
    assert {"bbox/AP", "keypoints/AP"} <= record.metrics.keys()
    assert "segm/AP" not in record.metrics
    line = json.loads(ready.run.log_file.read_text().splitlines()[-1])
    assert {"rpn_objectness", "rpn_box", "roi_class", "roi_box", "roi_keypoint"} <= line.keys()
    saved = torch.load(ready.run.path / "detector.pth", weights_only=True)["model"]
    assert "roi_heads.keypoint_head.score_lowres.weight" in saved
    assert (ready.run.path / MATCHES["keypoints"]).is_file()
    matches = DetectionMatches.read(ready.run.path / MATCHES["keypoints"])
    assert AveragePrecision(matches)(np.ones(len(matches.objects))) == pytest.approx(
        max(record.metrics["keypoints/AP"], 0), abs=1e-9
    )
    found = load_detections(ready.run.path / NAME, ready.test)
    assert found
    assert all(one.keypoints is not None and len(one.keypoints) == 5 for one in found)
    assert "detections" in show_detections(ready.run.path, tmp_path / "found.png", 2, 0.0)


def test_what_was_found_is_read_back(persons: Path, tmp_path: Path) -> None:
    _, pictures = open_detection(recipe_of(KEYPOINTS, persons, tmp_path))
    found = random_finds(pictures, 0)
    save_detections(tmp_path / NAME, found, pictures)
    assert load_detections(tmp_path / NAME, pictures) == found


@pytest.mark.slow
def test_training_learns_keypoints_by_heart(persons: Path, tmp_path: Path, resnet18: Path) -> None:
    """After some steps on two pictures, the keypoints of their objects are found in their boxes."""
    recipe = recipe_of(KEYPOINTS, persons, tmp_path, "batch_size=2", "detector.roi.batch_per_image=32")
    train, _ = open_detection(recipe)
    state, info = load_backbone(resnet18)
    torch.manual_seed(0)
    detector: Any = recipe.detector.build(info.recipe, state, 1, masks=False).train()
    batch = next(training_batches(train, recipe, 0, 0, 1))
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.02, momentum=0.9)

    def far() -> float:
        """The mean distance of the labelled keypoints from what is found, in sides of their boxes."""
        away = []
        with torch.no_grad():
            boxes = [target.boxes for target in batch.targets]
            logits = detector.roi_heads.keypoint_head(
                detector.roi_heads.for_keypoints(detector.maps(batch.images), boxes)
            )
            found = most_likely_places(logits, torch.cat(boxes))
        for own, target, box in zip(found.split([len(b) for b in boxes]), batch.targets, boxes, strict=True):
            assert target.keypoints is not None
            side = (box[:, 2:] - box[:, :2])[:, None]
            distance = ((own[..., :2] - target.keypoints[..., :2]) / side).norm(dim=2)
            away.append(distance[target.keypoints[..., 2] > 0])
        return float(torch.cat(away).mean())

    before = far()
    for step in range(40):
        losses = detector.losses(batch.images, batch.targets, [generator(0, step, row) for row in range(2)])
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
    assert far() < 0.3 * before
