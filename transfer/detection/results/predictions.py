"""The detections of a run, saved beside its record; `show` draws them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from mixmask.engine.errors import DataError
from mixmask.engine.storage import write_atomic
from mixmask.engine.texts import read_run_file
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.results.metrics import FoundObject

MAX_FILE = 1 << 32  # bytes, unpacked
NAME = "detections.json.gz"
FORMAT = "mixmask-detections-1"


def save_detections(path: Path, found: Sequence[FoundObject], pictures: DetectionSet) -> None:
    """Write compressed JSON: picture keys, class names, and rows of picture, label, score, box, mask and keypoints."""
    rows = [
        [
            d.picture,
            d.label,
            d.score,
            list(d.box),
            None if d.mask is None else [d.mask["size"], _text(d.mask["counts"])],
            *([] if d.keypoints is None else [d.keypoints]),
        ]
        for d in found
    ]
    content = {
        "format": FORMAT,
        "pictures": [picture.key for picture in pictures.pictures],
        "classes": list(pictures.classes),
        "detections": rows,
    }
    # Without a time stamp, the same detections give the same bytes.
    write_atomic(path, lambda file: file.write(gzip.compress(json.dumps(content).encode(), mtime=0)))


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def load_detections(path: Path, pictures: DetectionSet) -> list[FoundObject]:
    """Read detections of these pictures.

    Raises:
        DataError: If the file is missing or damaged, or was made from other pictures or classes.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; a finished detection run with save_predictions: true has one")
    try:
        content = json.loads(read_run_file(path, MAX_FILE))
        if content["format"] != FORMAT:
            raise DataError(f"{path}: of the format {content['format']!r}, {FORMAT!r} was expected")
        keys, classes, rows = content["pictures"], content["classes"], content["detections"]
        found = [
            FoundObject(
                picture,
                label,
                score,
                tuple(box),
                None if mask is None else {"size": mask[0], "counts": mask[1]},
                tuple((x, y, probability) for x, y, probability in points[0]) if points else None,
            )
            for picture, label, score, box, mask, *points in rows
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if keys != [picture.key for picture in pictures.pictures] or classes != list(pictures.classes):
        raise DataError(f"{path}: its pictures or classes are not those that data.root holds now")
    return found
