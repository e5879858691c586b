"""What became of each detection and of each object of one picture, for drawings; the metrics have their own matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mixmask.transfer.detection.data.pictures import Instance
from mixmask.transfer.detection.results.metrics import FoundObject

Box = tuple[float, float, float, float]
Outcome = Literal["hit", "false alarm", "missed", "not counted"]
LEAST_IOU = 0.5


def outcomes(found: Sequence[FoundObject], instances: Sequence[Instance]) -> tuple[list[Outcome], list[Outcome]]:
    """Match the detections of a picture with its objects: the best first, each with the object that it covers best.

    A detection is a hit if an object of its class, not yet taken, has an IoU of 0.5 or more with it. Difficult objects and
    crowds are not counted: neither are the detections upon them.

    Returns:
        The outcome of each detection, and of each object (``missed`` if no detection took it).
    """
    of_found: list[Outcome] = ["false alarm"] * len(found)
    of_true: list[Outcome] = ["not counted" if one.difficult or one.crowd else "missed" for one in instances]
    for index in sorted(range(len(found)), key=lambda n: -found[n].score):
        overlaps = [
            (iou(found[index].box, one.box), place)
            for place, one in enumerate(instances)
            if one.label == found[index].label and of_true[place] != "hit"
        ]
        # What counts comes first: a crowd around an object does not take its detection away.
        overlaps.sort(key=lambda item: (of_true[item[1]] == "missed", item[0]), reverse=True)
        best = next((place for overlap, place in overlaps if overlap >= LEAST_IOU), None)
        if best is not None:
            of_found[index] = "hit" if of_true[best] == "missed" else "not counted"
            of_true[best] = "hit" if of_true[best] == "missed" else of_true[best]
    return of_found, of_true


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    return common / (_area(one) + _area(other) - common)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
