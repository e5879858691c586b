"""Average precision: VOC's 11-point one, and COCO's through pycocotools."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from mixmask.engine.predictions import DetectionMatches
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.scores import eleven_point_ap

Floats = npt.NDArray[np.float64]

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


@dataclass(frozen=True)
class FoundObject:
    """One detection in the pixels of the original image.

    Attributes:
        picture: Index of the picture in its `DetectionSet`.
        label: Class index.
        score: Confidence in [0, 1].
        box: Left, top, right, bottom, continuous.
        mask: COCO run-length encoding, or None.
        keypoints: x, y and probability of each, or None.
    """

    picture: int
    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: dict[str, Any] | None = None
    keypoints: tuple[tuple[float, float, float], ...] | None = None


# --- VOC -------------------------------------------------------------------------------------------------------------

Truth = dict[int, tuple[Floats, npt.NDArray[np.bool_]]]  # picture: boxes (G, 4), 1-based inclusive; difficult (G,)


def by_confidence(detections: Sequence[FoundObject]) -> list[FoundObject]:
    """The detections of a class, the most confident first; scores have three decimals, as in VOC's result files."""
    scores = np.array([float(f"{detection.score:.3f}") for detection in detections])
    return [detections[index] for index in np.argsort(-scores)]  # ties in NumPy's default order, as in Detectron2


def voc_class_matches(
    ranked: Sequence[FoundObject], truth: Truth, threshold: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which detections of one class are true positives, and which are ignored, at one IoU threshold.

    A detection belongs to the object that it overlaps most. It is a true positive if their IoU exceeds the threshold
    and no more confident detection has taken the object; it is ignored if the object is difficult. IoUs use VOC's
    inclusive pixels: a box from 3 to 5 is 3 wide. Corners have one decimal, as in the devkit's result files and in
    Detectron2.

    Args:
        ranked: The detections of this class, in the order of `by_confidence`.
        truth: The objects of this class.
        threshold: The IoU to exceed.

    Returns:
        (D,) true positives and (D,) ignored; the others are false positives.
    """
    taken = {picture: np.zeros(len(boxes), dtype=bool) for picture, (boxes, _) in truth.items()}
    found, ignored = np.zeros(len(ranked), dtype=bool), np.zeros(len(ranked), dtype=bool)
    for number, detection in enumerate(ranked):
        boxes, difficult = truth.get(detection.picture, (np.zeros((0, 4)), np.zeros(0, dtype=bool)))
        overlaps = _voc_overlaps(_as_written(detection.box), boxes)
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] <= threshold:
            continue
        if difficult[best]:
            ignored[number] = True
        elif not taken[detection.picture][best]:
            found[number] = taken[detection.picture][best] = True
    return found, ignored


def voc_class_ap(detections: Sequence[FoundObject], truth: Truth, threshold: float) -> float:
    """11-point AP of one class at one IoU threshold, in [0, 1]; 0 if no object of the class counts, as in Detectron2.

    Args:
        detections: The detections of this class, in the order of the pictures (which orders equal scores).
        truth: The objects of this class.
        threshold: The IoU to exceed.
    """
    num_objects = _num_counted(truth)
    if num_objects == 0:
        return 0.0
    found, ignored = voc_class_matches(by_confidence(detections), truth, threshold)
    hits, wrong = found.cumsum(), (~found & ~ignored).cumsum()
    precision = hits / np.maximum(hits + wrong, np.finfo(np.float64).eps)
    return eleven_point_ap(hits / num_objects, precision)


def _num_counted(truth: Truth) -> int:
    return sum(int((~difficult).sum()) for _, difficult in truth.values())


def _voc_truth(pictures: DetectionSet) -> list[Truth]:
    """The objects of each class, with VOC's own corners again: 1-based and inclusive."""
    truth: list[Truth] = [{} for _ in pictures.classes]
    for number, picture in enumerate(pictures.pictures):
        for label in {i.label for i in picture.instances}:
            own = [i for i in picture.instances if i.label == label]
            boxes = np.array([i.box for i in own], dtype=np.float64) + [1, 1, 0, 0]
            flags = np.array([i.difficult for i in own], dtype=bool)
            truth[label][number] = (boxes, flags)
    return truth


def _of_each_class(detections: Sequence[FoundObject], pictures: DetectionSet) -> list[list[FoundObject]]:
    classes: list[list[FoundObject]] = [[] for _ in pictures.classes]
    for detection in detections:
        classes[detection.label].append(detection)
    return classes


def voc_matches(detections: Sequence[FoundObject], pictures: DetectionSet) -> DetectionMatches:
    """The matches of all detections at every IoU threshold, for per-image statistics."""
    objects = np.zeros((len(pictures), len(pictures.classes)), dtype=np.int32)
    ranked: list[FoundObject] = []
    flags: list[npt.NDArray[np.bool_]] = []  # per class (2, T, D)
    for label, (truth, own) in enumerate(zip(_voc_truth(pictures), _of_each_class(detections, pictures), strict=True)):
        for picture, (_, difficult) in truth.items():
            objects[picture, label] = int((~difficult).sum())
        ordered = by_confidence(own)
        ranked += ordered
        flags.append(
            np.array([voc_class_matches(ordered, truth, threshold) for threshold in IOU_THRESHOLDS]).swapaxes(0, 1)
        )
    found, ignored = np.concatenate(flags, axis=2)
    return DetectionMatches(
        images=str(pictures.summary()["listing"]),
        metric="voc",
        thresholds=np.array(IOU_THRESHOLDS),
        image=np.array([d.picture for d in ranked], dtype=np.int64),
        label=np.array([d.label for d in ranked], dtype=np.int64),
        found=found,
        ignored=ignored,
        objects=objects,
    )


def _as_written(box: tuple[float, float, float, float]) -> Floats:
    """A box as it would stand in a devkit's result file: corners from 1, one decimal."""
    # float32, as in Detectron2: both must round the same numbers.
    left, top, right, bottom = np.asarray(box, dtype=np.float32) + np.array([1, 1, 0, 0], dtype=np.float32)
    return np.array([float(f"{value:.1f}") for value in (left, top, right, bottom)])


def _voc_overlaps(box: Floats, boxes: Floats) -> Floats:
    """IoU of one box with (G, 4) boxes, corners inclusive."""
    width = np.maximum(np.minimum(boxes[:, 2], box[2]) - np.maximum(boxes[:, 0], box[0]) + 1, 0)
    height = np.maximum(np.minimum(boxes[:, 3], box[3]) - np.maximum(boxes[:, 1], box[1]) + 1, 0)
    shared = width * height
    own = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
    others = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    overlaps: Floats = shared / (own + others - shared)
    return overlaps


def voc_metrics(detections: Sequence[FoundObject], pictures: DetectionSet) -> dict[str, float]:
    """VOC's average precision in percent.

    ``bbox/AP`` (mean over IoUs 0.50:0.05:0.95), ``bbox/AP50``, ``bbox/AP75``, and ``bbox/AP/cat``, ``bbox/AP50/cat`` …
    per class.
    """
    table = np.array(
        [
            [voc_class_ap(own, truth, threshold) for threshold in IOU_THRESHOLDS]
            for own, truth in zip(_of_each_class(detections, pictures), _voc_truth(pictures), strict=True)
        ]
    )
    mean = 100 * table.mean(axis=0)
    metrics = {"bbox/AP": float(mean.mean()), "bbox/AP50": float(mean[0]), "bbox/AP75": float(mean[5])}
    for name, row in zip(pictures.classes, table, strict=True):
        metrics[f"bbox/AP/{name}"] = float(100 * row.mean())
        metrics[f"bbox/AP50/{name}"] = float(100 * row[0])
    return metrics


# --- COCO ------------------------------------------------------------------------------------------------------------

MOST_AT_ONCE = 200  # pycocotools counts the masks whose areas it gives in eight bits
# In the order of COCOeval's ``stats``; of keypoints, small objects are not measured.
SHAPES = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # COCO's keys of them
COCO_NAMES = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}


def coco_metrics(detections: Sequence[FoundObject], pictures: DetectionSet, kinds: Sequence[str]) -> dict[str, float]:
    """COCOeval's average precision in percent of each kind: ``bbox/…``, ``segm/…``, ``keypoints/…``.

    AP, AP50, AP75, APs, APm, APl, and ``AP/cat`` … per class. Sizes and classes without objects are left out.
    """
    if not detections:  # pycocotools cannot load an empty list of results
        return {f"{kind}/{name}": 0.0 for kind in kinds for name in COCO_NAMES[kind][:3]}
    metrics: dict[str, float] = {}
    for kind, (stats, every) in _coco_evaluation(detections, pictures, kinds).items():
        # -1 where no object has the size.
        metrics.update(
            {f"{kind}/{name}": 100 * value for name, value in zip(COCO_NAMES[kind], stats, strict=False) if value >= 0}
        )
        precision = every[..., 0, -1]  # (overlaps, recalls, classes), all sizes, as many detections as count
        for number, name in enumerate(pictures.classes):
            of_class = precision[:, :, number]
            if (of_class > -1).any():
                metrics[f"{kind}/AP/{name}"] = float(100 * of_class[of_class > -1].mean())
    return metrics


def coco_backend() -> str:
    """What computes COCO's metrics here: ``faster-coco-eval`` where it is installed, else ``pycocotools``.

    They agree to rounding: both go through the same matches, and sum in another order.
    """
    return "pycocotools" if importlib.util.find_spec("faster_coco_eval") is None else "faster-coco-eval"


def _coco_evaluation(
    detections: Sequence[FoundObject], pictures: DetectionSet, kinds: Sequence[str]
) -> dict[str, tuple[list[float], npt.NDArray[np.float64]]]:
    """Of each kind the statistics, and the precisions (overlaps, recalls, classes, sizes, most detections)."""
    from pycocotools.coco import COCO  # imports matplotlib
    from pycocotools.cocoeval import COCOeval

    reader, judge = COCO, COCOeval
    if coco_backend() == "faster-coco-eval":
        import faster_coco_eval

        reader, judge = faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
    judged = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = coco_truth(pictures, reader), reader()
        rows = _results(detections, pictures, kinds)
        found.dataset = {**truth.dataset, "annotations": rows}
        found.createIndex()
        for kind in kinds:
            for row, area in zip(rows, _areas(detections, kind), strict=True):
                row["area"] = area
            evaluation = judge(truth, found, kind)
            evaluation.params.imgIds = [int(picture.key) for picture in pictures.pictures]
            if pictures.keypoints is not None:
                evaluation.params.kpt_oks_sigmas = np.array(pictures.keypoints.sigmas)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            judged[kind] = ([float(value) for value in evaluation.stats], np.asarray(evaluation.eval["precision"]))
    return judged


def coco_truth(pictures: DetectionSet, reader: type[Any] | None = None) -> Any:
    """The annotations as an instance of pycocotools' ``COCO``, or of a class with its interface."""
    from pycocotools.coco import COCO

    truth = (reader or COCO)()
    truth.dataset = _merged(pictures)
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it does so
        truth.createIndex()
    return truth


def _results(detections: Sequence[FoundObject], pictures: DetectionSet, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """What COCO's ``loadRes`` would make of the detections, for all kinds at once, but without areas."""
    keys, categories = [int(picture.key) for picture in pictures.pictures], pictures.category_ids
    rows = []
    for number, one in enumerate(detections, start=1):
        row: dict[str, Any] = {
            "id": number,
            "image_id": keys[one.picture],
            "category_id": categories[one.label],
            "score": one.score,
            "iscrowd": 0,
        }
        for kind in kinds:
            row[SHAPES[kind]] = coco_shape(one, kind)
        rows.append(row)
    return rows


def _areas(detections: Sequence[FoundObject], kind: str) -> list[float]:
    """Areas in pixels. Of keypoints it is the box's: Detectron2 gives COCO's evaluation the boxes with them."""
    if kind != "segm":
        return [(right - left) * (bottom - top) for left, top, right, bottom in (one.box for one in detections)]
    codes = [one.mask for one in detections]
    parts = [codes[first : first + MOST_AT_ONCE] for first in range(0, len(codes), MOST_AT_ONCE)]
    return [area for part in parts for area in coco_mask.area(part).tolist()]


def _merged(pictures: DetectionSet) -> dict[str, Any]:
    """The COCO documents of a split as one."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in pictures.source]
    return {
        "info": {},
        "images": [image for document in documents for image in document["images"]],
        "annotations": [item for document in documents for item in document["annotations"]],
        "categories": documents[0]["categories"],
    }


def coco_shape(found: FoundObject, kind: str) -> Any:
    """What of a detection is compared with the objects, as COCO's result files have it."""
    if kind == "bbox":
        left, top, right, bottom = found.box
        return [left, top, right - left, bottom - top]
    if kind == "segm":
        return found.mask
    # COCO's keypoints are numbers of pixels: 0 is the middle of the first.
    return [value for x, y, probability in found.keypoints or () for value in (x - 0.5, y - 0.5, probability)]
