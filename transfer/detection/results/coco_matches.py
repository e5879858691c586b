"""Which detections are true positives by COCO's rules, image by image: what statistics over images are computed from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from mixmask.engine.predictions import DetectionMatches
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.results.metrics import FoundObject, coco_shape, coco_truth

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Objects:
    """The objects of one class in one image, those that count first."""

    shapes: list[Any]
    ignored: list[bool]
    crowd: list[bool]


def coco_matches(detections: Sequence[FoundObject], pictures: DetectionSet, kind: str) -> DetectionMatches:
    """The matches of all detections: objects of all sizes, and per image and class at most 100 detections (20 of keypoints).

    pycocotools' ``evaluateImg`` gives the same. It goes through four ranges of sizes, and in Python through all pairs of a
    detection and an object; here only detections that overlap an object by half are looked at.

    Args:
        detections: What was found.
        pictures: The test set.
        kind: ``bbox``, ``segm`` or ``keypoints``.
    """
    from pycocotools.cocoeval import Params  # imports matplotlib

    params = Params(iouType=kind)
    thresholds, most = np.asarray(params.iouThrs), params.maxDets[-1]
    truth = _objects(pictures, kind, params.areaRng[0])
    of_pair: dict[tuple[int, int], list[FoundObject]] = defaultdict(list)
    for detection in detections:
        of_pair[detection.label, detection.picture].append(detection)
    counts = np.zeros((len(pictures), len(pictures.classes)), dtype=np.int32)
    for (label, picture), objects in truth.items():
        counts[picture, label] = len(objects.ignored) - sum(objects.ignored)
    order = sorted(range(len(pictures)), key=lambda number: int(pictures.pictures[number].key))  # as in pycocotools
    nothing = _Objects([], [], [])
    images, labels, founds, ignores = [], [], [], []
    for label in range(len(pictures.classes)):
        none = np.zeros((len(thresholds), 0), dtype=bool)
        scores, own, found, ignored = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], [none], [none]
        for picture in order:
            candidates = of_pair.get((label, picture), [])
            if candidates:
                best = np.argsort([-one.score for one in candidates], kind="mergesort")[:most]
                ranked = [candidates[number] for number in best]
                overlaps = _overlaps(ranked, truth.get((label, picture), nothing), pictures, kind)
                right, neither = match_in_order(overlaps, truth.get((label, picture), nothing), thresholds)
                scores.append(np.array([one.score for one in ranked]))
                own.append(np.full(len(ranked), picture))
                found.append(right)
                ignored.append(neither)
        ranking = np.argsort(-np.concatenate(scores), kind="mergesort")
        images.append(np.concatenate(own)[ranking])
        labels.append(np.full(len(ranking), label, dtype=np.int64))
        founds.append(np.concatenate(found, axis=1)[:, ranking])
        ignores.append(np.concatenate(ignored, axis=1)[:, ranking])
    return DetectionMatches(
        images=str(pictures.summary()["listing"]),
        metric="coco",
        thresholds=thresholds,
        image=np.concatenate(images),
        label=np.concatenate(labels),
        found=np.concatenate(founds, axis=1),
        ignored=np.concatenate(ignores, axis=1),
        objects=counts,
    )


def match_in_order(overlaps: Floats, objects: _Objects, thresholds: Floats) -> tuple[Bools, Bools]:
    """(T, D) true positives and ignored detections of one class in one image.

    In order of confidence, a detection takes the free object that it overlaps most, if by the threshold at least. One that
    counts goes before one that is ignored; a crowd is never used up.

    Args:
        overlaps: (D, G) IoU of the detections, the most confident first, with the objects.
        objects: Those that count first.
        thresholds: (T,).
    """
    right = np.zeros((len(thresholds), len(overlaps)), dtype=bool)
    neither = np.zeros_like(right)
    if not overlaps.size:
        return right, neither
    rows = (overlaps.max(axis=1) >= thresholds[0]).nonzero()[0].tolist()
    values = {row: overlaps[row].tolist() for row in rows}
    for number, threshold in enumerate(thresholds.tolist()):
        taken = [False] * overlaps.shape[1]
        for row in rows:
            least, best = min(threshold, 1 - 1e-10), -1
            for place, overlap in enumerate(values[row]):
                if taken[place] and not objects.crowd[place]:
                    continue
                if best >= 0 and not objects.ignored[best] and objects.ignored[place]:
                    break
                if overlap >= least:
                    least, best = overlap, place
            if best >= 0:
                taken[best] = True
                (neither if objects.ignored[best] else right)[number, row] = True
    return right, neither


def _objects(pictures: DetectionSet, kind: str, sizes: Sequence[float]) -> dict[tuple[int, int], _Objects]:
    """The objects by (label, picture)."""
    truth = coco_truth(pictures)
    index = {int(picture.key): number for number, picture in enumerate(pictures.pictures)}
    label_of = {category: label for label, category in enumerate(pictures.category_ids)}
    listed: dict[tuple[int, int], list[tuple[bool, bool, Any]]] = defaultdict(list)
    for item in truth.dataset["annotations"]:
        crowd = bool(item.get("iscrowd", 0))
        ignored = crowd or not sizes[0] <= item["area"] <= sizes[1]
        if kind == "keypoints":
            ignored = ignored or item["num_keypoints"] == 0
            shape: Any = item
        else:
            shape = item["bbox"] if kind == "bbox" else truth.annToRLE(item)
        listed[label_of[item["category_id"]], index[item["image_id"]]].append((ignored, crowd, shape))
    found = {}
    for place, own in listed.items():
        own.sort(key=lambda one: one[0])  # those that count first; the order within stays
        found[place] = _Objects([s for _, _, s in own], [i for i, _, _ in own], [c for _, c, _ in own])
    return found


def _overlaps(ranked: Sequence[FoundObject], objects: _Objects, pictures: DetectionSet, kind: str) -> Floats:
    """(D, G) IoU by pycocotools, with a crowd the share of the detection that is inside; of keypoints their similarity."""
    if not objects.shapes:
        return np.zeros((len(ranked), 0))
    if kind == "keypoints":
        assert pictures.keypoints is not None
        found = np.array([coco_shape(one, kind) for one in ranked]).reshape(len(ranked), -1, 3)
        every = [keypoint_similarity(found, item, pictures.keypoints.sigmas) for item in objects.shapes]
        return np.stack(every, axis=1)
    shapes = [coco_shape(one, kind) for one in ranked]
    overlaps: Floats = np.asarray(coco_mask.iou(shapes, objects.shapes, [int(crowd) for crowd in objects.crowd]))
    return overlaps


def keypoint_similarity(found: Floats, item: Mapping[str, Any], sigmas: Sequence[float]) -> Floats:
    """(D,) COCO's object keypoint similarity (OKS) of detections with one object.

    The mean over the labelled keypoints of exp(-d² / 2 s² k²), with the distance d, the object's area s² and twice the
    keypoint's sigma k. If none is labelled, it is how far all keypoints are from the object's box, doubled to each side.

    Args:
        found: (D, K, 3) x, y and anything.
        item: A COCO annotation with keypoints.
        sigmas: (K,).
    """
    truth = np.array(item["keypoints"], dtype=np.float64).reshape(-1, 3)
    labelled = truth[:, 2] > 0
    if labelled.any():
        away = found[..., :2] - truth[:, :2]
    else:
        left, top, width, height = item["bbox"]
        low, high = np.array([left - width, top - height]), np.array([left + 2 * width, top + 2 * height])
        away = np.maximum(low - found[..., :2], 0) + np.maximum(found[..., :2] - high, 0)
        labelled = np.ones(len(truth), dtype=bool)
    spread = (2 * np.array(sigmas)) ** 2 * 2 * (item["area"] + np.spacing(1))
    similarity: Floats = np.exp(-(away**2).sum(axis=2) / spread)[:, labelled].mean(axis=1)
    return similarity
