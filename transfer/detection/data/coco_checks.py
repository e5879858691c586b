"""What a COCO annotation file must hold before anything is trained or evaluated on it.

The types and ranges are those of COCO's own format (cocodataset.org, "Data format"). What COCO's own files contain is
valid: train2017 has boxes of zero width or height, and some boxes and outlines reach slightly over the image's border.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmask.engine.errors import DataError
from mixmask.transfer.detection.data.keypoints import read_keypoints

MAX_SIDE = 1_000_000  # pixels
MAX_ID = 1 << 53  # the largest whole number that every reader of JSON keeps
SLACK_PIXELS, SLACK_PART = 10.0, 0.1  # how far a box may reach over the border


def check_document(document: Any, file: Path, evaluated: bool, sigmas: Sequence[float] = ()) -> str | None:
    """Check every image, category and annotation of a document.

    Args:
        document: What the file holds.
        file: For messages.
        evaluated: Whether the file is used for evaluation, which needs more fields than training.
        sigmas: One for each keypoint that every object must have; empty if keypoints are not used.

    Returns:
        A line that counts the boxes that training leaves out or clips; None if there are none.

    Raises:
        DataError: The message names the file, the id, the key and its value.
    """
    if not isinstance(document, dict):
        raise DataError(f"{file}: not a COCO annotation file: a JSON {type(document).__name__} instead of an object")
    for kind in ("images", "annotations", "categories"):
        if not isinstance(document.get(kind), list):
            raise DataError(f"{file}: not a COCO annotation file: no list '{kind}'")
        broken = [item for item in document[kind] if not isinstance(item, dict)]
        if broken:
            raise DataError(f"{file}: not a COCO annotation file: {kind} with {_shown(broken[0])}")
    sizes = _images(document["images"], file)
    categories = _categories(document["categories"], file)
    if sigmas:
        read_keypoints(document["categories"], file, sigmas)
    _require_ids(document["annotations"], "annotations", 1, file)  # COCO's evaluation takes an annotation 0 for none
    empty = over = 0
    for item in document["annotations"]:
        where = f"{file}: annotation {item['id']}"
        if not _whole(item.get("image_id")) or item["image_id"] not in sizes:
            raise DataError(f"{where} belongs to image {_shown(item.get('image_id'))}, which is not listed")
        if not _whole(item.get("category_id")) or item["category_id"] not in categories:
            raise DataError(f"{where} has the unknown category {_shown(item.get('category_id'))}")
        width, height = sizes[item["image_id"]]
        left, top, wide, high = _box(item.get("bbox"), where)
        _require_within((left, left + wide), (top, top + high), width, height, f"{where}: its box {item['bbox']}")
        empty += wide == 0 or high == 0
        over += left < 0 or top < 0 or left + wide > width or top + high > height
        _check_flags(item, where)
        _check_outline(item, where, width, height)
        if sigmas:
            _check_keypoints(item, len(sigmas), where, width, height)
        if evaluated:
            _check_evaluated(item, where, "num_keypoints" if sigmas else "segmentation")
    parts = [
        f"{what}: {number:,}"
        for number, what in (
            (empty, "boxes of no width or height, which training leaves out"),
            (over, "boxes that reach over the border, which training clips"),
        )
        if number
    ]
    return f"{file}: {'; '.join(parts)}" if parts else None


def _images(images: list[dict[str, Any]], file: Path) -> dict[int, tuple[int, int]]:
    _require_ids(images, "images", 0, file)
    sizes = {}
    for image in images:
        where = f"{file}: image {image['id']}"
        for side in ("width", "height"):
            if not _whole(image.get(side)) or not 0 < image[side] <= MAX_SIDE:
                raise DataError(f"{where}: {side} is {_shown(image.get(side))}; a number of pixels is valid")
        name = image.get("file_name")
        if not isinstance(name, str) or not name or "\0" in name:
            raise DataError(f"{where}: file_name is {_shown(name)}; the name of a file is valid")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{where}: file_name {_shown(name)} leads out of the folder of images")
        sizes[image["id"]] = (image["width"], image["height"])
    return sizes


def _categories(categories: list[dict[str, Any]], file: Path) -> set[int]:
    _require_ids(categories, "categories", 0, file)
    for category in categories:
        if not isinstance(category.get("name"), str) or not category["name"].strip():
            raise DataError(
                f"{file}: category {category['id']}: name is {_shown(category.get('name'))}; a text is valid"
            )
    twice = [name for name, count in Counter(category["name"] for category in categories).items() if count > 1]
    if twice:
        raise DataError(f"{file}: several categories are called {_shown(twice[0])}")
    return {category["id"] for category in categories}


def _require_ids(items: list[dict[str, Any]], kind: str, least: int, file: Path) -> None:
    ids = [item.get("id") for item in items]
    wrong = [i for i in ids if type(i) is not int or not least <= i <= MAX_ID]
    if wrong:
        raise DataError(f"{file}: {kind} with the id {_shown(wrong[0])}; whole numbers from {least} are valid")
    if len(set(ids)) < len(ids):
        twice = next(i for i, count in Counter(ids).items() if count > 1)
        raise DataError(f"{file}: several {kind} have the id {twice}")


def _whole(value: object) -> bool:
    return type(value) is int  # isinstance would accept True


def _number(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _box(box: object, where: str) -> tuple[float, float, float, float]:
    if not isinstance(box, list) or len(box) != 4 or not all(_number(v) and abs(v) < 1e9 for v in box):
        raise DataError(f"{where}: bbox is {_shown(box)}; [left, top, width, height] in pixels is valid")
    left, top, wide, high = (float(value) for value in box)
    if wide < 0 or high < 0:
        raise DataError(f"{where}: bbox is {_shown(box)}, with a negative size")
    return left, top, wide, high


def _require_within(xs: tuple[float, float], ys: tuple[float, float], width: int, height: int, what: str) -> None:
    for (low, high), side in ((xs, width), (ys, height)):
        slack = max(SLACK_PIXELS, SLACK_PART * side)
        if low < -slack or high > side + slack:
            raise DataError(f"{what} lies far outside its image of {width}×{height} pixels")


def _check_flags(item: Mapping[str, Any], where: str) -> None:
    if "iscrowd" in item and item["iscrowd"] not in (0, 1):
        raise DataError(f"{where}: iscrowd is {_shown(item['iscrowd'])}; 0 and 1 are valid")
    if "area" in item and not (_number(item["area"]) and 0 <= item["area"] < 1e15):
        raise DataError(f"{where}: area is {_shown(item['area'])}; a number from 0 is valid")


def _check_outline(item: Mapping[str, Any], where: str, width: int, height: int) -> None:
    outline = item.get("segmentation", [])
    if isinstance(outline, dict):
        _check_runs(outline, where, width, height)
        return
    if not isinstance(outline, list):
        raise DataError(f"{where}: segmentation is {_shown(outline)}; polygons or a run-length mask are valid")
    for polygon in outline:
        if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
            raise DataError(f"{where}: segmentation holds {_shown(polygon)}; lists of x, y, x, y, … are valid")
        if not polygon:
            continue
        low, high = min(polygon), max(polygon)
        if not (abs(low) < 1e9 and abs(high) < 1e9 and math.isfinite(sum(polygon))):
            raise DataError(f"{where}: segmentation holds numbers that are not finite or beyond any image")
        xs, ys = polygon[0::2], polygon[1::2] or [0]
        _require_within((min(xs), max(xs)), (min(ys), max(ys)), width, height, f"{where}: its outline")


def _check_runs(mask: Mapping[str, Any], where: str, width: int, height: int) -> None:
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or not all(map(_whole, size)) or size != [height, width]:
        raise DataError(f"{where}: its run-length mask has the size {_shown(size)}, its image {[height, width]}")
    if isinstance(counts, str):
        counts = _decoded(counts, where, height * width)
    if not isinstance(counts, list) or not all(_whole(run) and run >= 0 for run in counts):
        raise DataError(
            f"{where}: its run-length mask has the counts {_shown(counts)}; a whole number of at least 0 was expected"
        )
    if sum(counts) != height * width:
        raise DataError(f"{where}: its run-length mask covers {sum(counts):,} pixels, its image has {height * width:,}")


def _decoded(text: str, where: str, pixels: int) -> list[int]:
    """Decode COCO's compressed runs.

    A run is written in groups of five bits and a continuation bit, as characters from 48 on. From the fourth run on,
    its difference from the run two before it is stored.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60 or len(runs) > pixels + 1:
            break
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            # The highest bit of the last group is the sign.
            if bits & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    else:
        if not shift:
            return runs
    raise DataError(f"{where}: its compressed run-length mask is damaged")


def _check_keypoints(item: Mapping[str, Any], number: int, where: str, width: int, height: int) -> None:
    points = item.get("keypoints")
    if not isinstance(points, list) or len(points) != 3 * number or not all(_number(value) for value in points):
        raise DataError(f"{where}: keypoints is {_shown(points)}; {number} times x, y, 0 … 2 is valid")
    if not set(points[2::3]) <= {0, 1, 2}:
        raise DataError(f"{where}: keypoints has the flags {_shown(points[2::3])}; 0, 1 and 2 are valid")
    labelled = [(x, y) for x, y, flag in zip(points[0::3], points[1::3], points[2::3], strict=True) if flag]
    if labelled:
        xs, ys = zip(*labelled, strict=True)
        _require_within((min(xs), max(xs)), (min(ys), max(ys)), width, height, f"{where}: one of its keypoints")
    told = item.get("num_keypoints", len(labelled))
    if told != len(labelled):
        raise DataError(f"{where}: num_keypoints is {_shown(told)}, labelled are {len(labelled)} of its keypoints")


def _check_evaluated(item: Mapping[str, Any], where: str, shape: str) -> None:
    absent = [key for key in ("area", "iscrowd", shape, "bbox", "category_id") if key not in item]
    if absent:
        raise DataError(f"{where} has no {', '.join(absent)}, which COCO's evaluation needs")
    outline = item.get("segmentation") if shape == "segmentation" else None
    if outline is None:
        return
    if isinstance(outline, list) and not (outline and all(len(p) >= 6 and len(p) % 2 == 0 for p in outline)):
        raise DataError(f"{where} has an outline of fewer than three points: no mask to evaluate")


def _shown(value: object) -> str:
    """A value as text for a message, at most 80 characters of it."""
    # Python refuses to write integers of thousands of digits.
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a very large number"
    return text if len(text) <= 80 else f"{text[:80]}…"
