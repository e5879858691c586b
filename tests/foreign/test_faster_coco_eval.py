"""Our COCO evaluation against the results that faster-coco-eval's tests expect (MiXaiLL76/faster_coco_eval, tests)."""

from __future__ import annotations

import copy
import json
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mixmask.evaluate.average_precision import AveragePrecision
from mixmask.transfer.detection.data.keypoints import Keypoints
from mixmask.transfer.detection.data.pictures import DetectionSet, Picture
from mixmask.transfer.detection.detectors.keypoints import KeypointRecipe
from mixmask.transfer.detection.results import metrics
from mixmask.transfer.detection.results.coco_matches import coco_matches
from mixmask.transfer.detection.results.metrics import COCO_NAMES, FoundObject, coco_metrics
from tests.foreign.clones import clone, module_of

TESTS = clone("faster_coco_eval", "faster-coco-eval") / "tests"
CLOSE = 1e-10  # ours is in percent


def theirs(name: str) -> Any:
    """One of their test modules; a test that they repeat for several backends is called here with its arguments."""
    repeated = ModuleType("parameterized")
    repeated.parameterized = type("parameterized", (), {"expand": lambda cases: lambda test: test})
    return module_of(TESTS / f"{name}.py", {"parameterized": repeated})


class Truth:
    """Our stand-in for their ``COCO``: a file of annotations."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.dataset = json.loads(self.file.read_text())
        self.imgs = {image["id"]: image for image in self.dataset["images"]}

    @staticmethod
    def load_json(file: str | Path) -> Any:
        return json.loads(Path(file).read_text())

    def info(self) -> None:
        pass

    def loadRes(self, found: Any) -> list[dict[str, Any]]:
        return found if isinstance(found, list) else json.loads(Path(found).read_text())

    def pictures(self, kind: str) -> DetectionSet:
        images, categories = self.dataset["images"], sorted(self.dataset["categories"], key=lambda one: one["id"])
        pictures = tuple(Picture(str(i["id"]), Path(i["file_name"]), i["width"], i["height"], ()) for i in images)
        names, ids = tuple(one["name"] for one in categories), tuple(one["id"] for one in categories)
        sigmas = KeypointRecipe.model_fields["oks_sigmas"].default
        keypoints = Keypoints((), (), sigmas) if kind == "keypoints" else None
        return DetectionSet(pictures, names, (self.file,), ids, keypoints)


class Number(float):
    """A value of ours; that it comes back from percent does not count."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(float(self) - other) < CLOSE

    __hash__ = float.__hash__


class Unreported(float):
    """A recall: ours reports none, so any value will do."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = float.__hash__


class Evaluation:
    """Our stand-in for their ``COCOeval``."""

    def __init__(self, truth: Truth, rows: list[dict[str, Any]], iouType: str) -> None:
        self.truth, self.rows, self.kind = truth, rows, iouType
        self.stats = Statistics()

    def evaluate(self) -> None:
        pictures = self.truth.pictures(self.kind)
        place = {picture.key: number for number, picture in enumerate(pictures.pictures)}
        found = [
            FoundObject(
                place[str(row["image_id"])],
                pictures.category_ids.index(row["category_id"]),
                float(row["score"]),
                _corners(row),
                self._mask(row),
                self._points(row),
            )
            for row in self.rows
        ]
        values, names = coco_metrics(found, pictures, [self.kind]), COCO_NAMES[self.kind]
        own = [values.get(f"{self.kind}/{name}", -100.0) / 100 for name in names]
        # The same from the matches that a run keeps for its statistics.
        again = AveragePrecision(coco_matches(found, pictures, self.kind))(np.ones(len(pictures))) / 100
        assert again == pytest.approx(own[0], abs=CLOSE)
        self.stats = Statistics([*map(Number, own), *[Unreported()] * (10 - len(own) + 2 * (self.kind != "keypoints"))])

    def _mask(self, row: dict[str, Any]) -> dict[str, Any] | None:
        if self.kind != "segm":
            return None
        shape, image = row["segmentation"], self.truth.imgs[row["image_id"]]
        if isinstance(shape, list):
            shape = coco_mask.merge(coco_mask.frPyObjects(shape, image["height"], image["width"]))
        return dict(shape)

    def _points(self, row: dict[str, Any]) -> tuple[tuple[float, float, float], ...] | None:
        if self.kind != "keypoints":
            return None
        points = np.array(row["keypoints"], dtype=np.float64).reshape(-1, 3) + [0.5, 0.5, 0]  # ours are continuous
        return tuple((x, y, probability) for x, y, probability in points.tolist())

    def accumulate(self) -> None:
        """Done by `evaluate`."""

    summarize = accumulate


class Statistics(list[float]):
    """A list with an array's ``tolist``."""

    def tolist(self) -> list[float]:
        return list(self)


def _corners(row: dict[str, Any]) -> tuple[float, float, float, float]:
    if "bbox" in row:
        left, top, width, height = (float(value) for value in row["bbox"])
        return left, top, left + width, top + height
    if "segmentation" in row:
        left, top, width, height = coco_mask.toBbox(row["segmentation"]).tolist()
        return left, top, left + width, top + height
    x, y = np.array(row["keypoints"]).reshape(-1, 3)[:, :2].T  # as COCO's `loadRes` does it
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())


@pytest.fixture(params=["faster-coco-eval", "pycocotools"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours with either backend."""
    if request.param == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    monkeypatch.setattr(metrics, "coco_backend", lambda: request.param)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_of_the_coco_api_s_hundred_images(kind: str) -> None:
    module = theirs("test_cocoapi_fake_data")
    module.COCO, module.COCOeval_faster = Truth, Evaluation
    run(module.TestCOCOAPI, "test_eval", kind)


def test_of_persons() -> None:
    run(theirs("test_keypoints").TestKeypointsMetric, "test_evaluate", Truth, Evaluation)


@pytest.mark.parametrize("name", ["test_evaluate", "test_detectron2_eval"])
def test_of_other_projects(name: str) -> None:
    """MMDetection's and Detectron2's tests, as they have them."""
    run(theirs("test_coco_metric").TestCocoMetric, name, Truth, Evaluation)


DRAWN = [
    ("test_bbox_detection_extensive", "small", 10, 5, 5),
    ("test_bbox_detection_extensive", "medium", 50, 10, 10),
    ("test_segmentation_extensive", "small", 10, 5, 5),
    ("test_keypoints_extensive", "small", 10, 3, 5),
    ("test_edge_case_perfect_predictions",),
    ("test_mixed_object_sizes",),
]


@pytest.mark.parametrize("name", DRAWN, ids=lambda one: "-".join(map(str, one)))
def test_of_drawn_objects(name: tuple[Any, ...]) -> None:
    """Their comparisons with pycocotools, with ours in the place of theirs."""
    module = theirs("test_extensive_pycocotools_comparison")

    def compare(case: object, file: str, rows: list[dict[str, Any]], kind: str) -> tuple[Any, Any, bool]:
        # Their ids begin at 0, which COCO's evaluation takes for "not found" and our reader of annotations refuses.
        document = json.loads(Path(file).read_text())
        for item in document["annotations"]:
            item["id"] += 1
        Path(file).write_text(json.dumps(document))
        truth = module.origCOCO(file)
        judge = module.origCOCOeval(truth, truth.loadRes(copy.deepcopy(rows)), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        ours = Evaluation(Truth(file), rows, kind)
        ours.evaluate()
        own, other = np.array(ours.stats[:6]), judge.stats[:6]
        if kind == "keypoints":
            own, other = own[:5], other[:5]
        return own, other, bool(np.allclose(own, other, rtol=CLOSE, atol=CLOSE))

    module.TestExtensivePycocotoolsComparison._compare_evaluators = compare
    run(module.TestExtensivePycocotoolsComparison, *name)


def run(tests: type[unittest.TestCase], name: str, *arguments: object) -> None:
    """One method of a test class with arguments."""
    case = tests(name)
    case.setUp()
    try:
        getattr(case, name)(*arguments)
    finally:
        case.tearDown()
