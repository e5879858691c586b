"""Average precision: VOC's 11-point one, and COCO's through pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transfer.detection.annotations import DetectionSet

Floats = npt.NDArray[np.float64]

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


@dataclass(frozen=True)
class Found:
    """One detection in the pixels of the original image.

    Attributes:
        picture: Index of the picture in its `DetectionSet`.
        label: Class index.
        score: Confidence in [0, 1].
        box: Left, top, right, bottom, continuous.
        mask: COCO run-length encoding, or None.
    """

    picture: int
    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: dict[str, Any] | None = None


# --- VOC -------------------------------------------------------------------------------------------------------------


def eleven_point_ap(recall: Floats, precision: Floats) -> float:
    """Mean over the recalls 0, 0.1, …, 1 of the best precision at that recall or beyond (VOC 2007, section 3.4.1).

    Args:
        recall: (D,) after each detection, in order of confidence.
        precision: (D,) likewise.
    """
    total = 0.0
    for level in np.arange(0.0, 1.1, 0.1):
        reached = precision[recall >= level]
        total += float(reached.max()) / 11 if len(reached) else 0.0
    return total


def voc_class_ap(
    detections: Sequence[Found], truth: dict[int, tuple[Floats, npt.NDArray[np.bool_]]], threshold: float
) -> float:
    """AP of one class at one overlap, in [0, 1]; 0 if the class has no object that counts, as Detectron2 has it.

    Each object is found once: by the most confident detection that overlaps it most among all objects and exceeds the
    threshold. Detections of difficult objects count neither way. Overlaps use VOC's inclusive pixels: a box from 3 to 5
    is 3 wide. As in the devkit's result files, and in Detectron2, a score has three decimals and a corner one.

    Args:
        detections: Of this class, in the order of the pictures.
        truth: Picture index to boxes (G, 4) in VOC's 1-based inclusive corners and difficult flags (G,).
        threshold: Overlap (IoU) to exceed.
    """
    num_objects = sum(int((~difficult).sum()) for _, difficult in truth.values())
    if num_objects == 0:
        return 0.0
    scores = np.array([float(f"{detection.score:.3f}") for detection in detections])
    order = np.argsort(-scores)  # the order of equal scores is numpy's, as it is Detectron2's
    taken = {picture: np.zeros(len(boxes), dtype=bool) for picture, (boxes, _) in truth.items()}
    true_positive, false_positive = np.zeros(len(order)), np.zeros(len(order))
    for number, detection in enumerate(detections[index] for index in order):
        boxes, difficult = truth.get(detection.picture, (np.zeros((0, 4)), np.zeros(0, dtype=bool)))
        overlaps = _voc_overlaps(_as_written(detection.box), boxes)
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] <= threshold:
            false_positive[number] = 1
        elif not difficult[best]:
            if taken[detection.picture][best]:
                false_positive[number] = 1
            else:
                true_positive[number] = 1
                taken[detection.picture][best] = True
    found, wrong = true_positive.cumsum(), false_positive.cumsum()
    precision = found / np.maximum(found + wrong, np.finfo(np.float64).eps)
    return eleven_point_ap(found / num_objects, precision)


def _as_written(box: tuple[float, float, float, float]) -> Floats:
    """A box as it would stand in a devkit's result file: corners from 1, one decimal."""
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


def voc_metrics(detections: Sequence[Found], pictures: DetectionSet) -> dict[str, float]:
    """VOC's average precision in percent.

    ``bbox/AP`` (mean over overlaps 0.50:0.05:0.95), ``bbox/AP50``, ``bbox/AP75``, and ``bbox/AP/cat``, ``bbox/AP50/cat`` …
    per class.
    """
    per_class: dict[int, dict[int, tuple[Floats, npt.NDArray[np.bool_]]]] = {
        n: {} for n in range(len(pictures.classes))
    }
    for number, picture in enumerate(pictures.pictures):
        for label in {i.label for i in picture.instances}:
            own = [i for i in picture.instances if i.label == label]
            boxes = np.array([i.box for i in own], dtype=np.float64) + [1, 1, 0, 0]
            flags = np.array([i.difficult for i in own], dtype=bool)
            per_class[label][number] = (boxes, flags)
    by_class: dict[int, list[Found]] = {}
    for detection in detections:
        by_class.setdefault(detection.label, []).append(detection)
    table = np.array(
        [
            [voc_class_ap(by_class.get(label, []), truth, threshold) for threshold in IOU_THRESHOLDS]
            for label, truth in per_class.items()
        ]
    )
    mean = 100 * table.mean(axis=0)
    metrics = {"bbox/AP": float(mean.mean()), "bbox/AP50": float(mean[0]), "bbox/AP75": float(mean[5])}
    for name, row in zip(pictures.classes, table, strict=True):
        metrics[f"bbox/AP/{name}"] = float(100 * row.mean())
        metrics[f"bbox/AP50/{name}"] = float(100 * row[0])
    return metrics


# --- COCO ------------------------------------------------------------------------------------------------------------

COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def coco_metrics(detections: Sequence[Found], pictures: DetectionSet, masks: bool) -> dict[str, float]:
    """COCOeval's average precision in percent: boxes as ``bbox/…``, masks as ``segm/…``.

    AP, AP50, AP75, APs, APm, APl, and ``AP/cat`` … per class. Sizes and classes without objects are left out.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = _merged(pictures)
        truth.createIndex()
        metrics: dict[str, float] = {}
        for kind in ("bbox", "segm") if masks else ("bbox",):
            rows = [_coco_row(d, pictures, kind) for d in detections]
            if not rows:
                metrics.update({f"{kind}/{name}": 0.0 for name in COCO_NAMES[:3]})
                continue
            evaluation = COCOeval(truth, truth.loadRes(rows), kind)
            evaluation.params.imgIds = [int(picture.key) for picture in pictures.pictures]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values = zip(COCO_NAMES, evaluation.stats[:6].tolist(), strict=True)
            metrics.update({f"{kind}/{name}": 100 * value for name, value in values if value >= 0})
            precision = evaluation.eval["precision"][
                ..., 0, -1
            ]  # (overlaps, recalls, classes), all sizes, 100 detections
            for number, name in enumerate(pictures.classes):
                of_class = precision[:, :, number]
                if (of_class > -1).any():
                    metrics[f"{kind}/AP/{name}"] = float(100 * of_class[of_class > -1].mean())
    return metrics


def _merged(pictures: DetectionSet) -> dict[str, Any]:
    """The COCO documents of a split as one."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in pictures.source]
    return {
        "info": {},
        "images": [image for document in documents for image in document["images"]],
        "annotations": [item for document in documents for item in document["annotations"]],
        "categories": documents[0]["categories"],
    }


def _coco_row(found: Found, pictures: DetectionSet, kind: str) -> dict[str, Any]:
    left, top, right, bottom = found.box
    row: dict[str, Any] = {
        "image_id": int(pictures.pictures[found.picture].key),
        "category_id": pictures.category_ids[found.label],
        "score": found.score,
    }
    if kind == "bbox":
        row["bbox"] = [left, top, right - left, bottom - top]
    else:
        row["segmentation"] = found.mask
    return row
