"""Predictions of a finished run for each test image, from which per-image statistics are computed.

They are NumPy archives in the run directory, beside the record, if the recipe sets ``save_predictions``.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixmask.engine.errors import DataError
from mixmask.engine.storage import write_atomic
from mixmask.engine.texts import read_run_file

MAX_FILE, MAX_UNPACKED = 1 << 32, 1 << 34  # bytes
CLASSES = "predictions.npz"
MATCHES = {"bbox": "matches_bbox.npz", "segm": "matches_segm.npz", "keypoints": "matches_keypoints.npz"}
SHEET = "detections.jpg"  # some test images with their detections drawn in


@dataclass(frozen=True, eq=False)
class ClassPredictions:
    """A classifier's predictions, in the order of the test split.

    Attributes:
        images: Identity of the test split (`ImageSet.summary`).
        labels: (N,) int64 true classes.
        predicted: (N,) int64 most likely classes.
    """

    images: str
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        _write(path, "classes-1", images=np.array(self.images), labels=self.labels, predicted=self.predicted)

    @classmethod
    def read(cls, path: Path) -> ClassPredictions:
        """Read the file.

        Raises:
            DataError: If it is missing or damaged.
        """
        content = _read(path, "classes-1", ("images", "labels", "predicted"))
        labels, predicted = content["labels"], content["predicted"]
        if labels.ndim != 1 or labels.shape != predicted.shape or not len(labels):
            raise DataError(f"{path}: damaged ({labels.shape} labels, {predicted.shape} predictions)")
        return cls(str(content["images"]), labels, predicted)


@dataclass(frozen=True, eq=False)
class DetectionMatches:
    """A detector's detections, and which of them are true positives.

    Detections are matched to objects within an image, so the average precision of any resampling of the images can be
    computed from this file.

    Attributes:
        images: Identity of the test split (`DetectionSet.summary`).
        metric: ``voc`` (11-point interpolation, classes without objects count 0) or ``coco`` (101-point interpolation,
            classes without objects are left out).
        thresholds: (T,) IoU thresholds.
        image: (D,) int64 index of each detection's image, in order of confidence within its class.
        label: (D,) int64 class.
        found: (T, D) bool, true positives.
        ignored: (T, D) bool, neither true nor false positives (difficult objects, crowds).
        objects: (N, C) int32, number of ground-truth objects that count, per image and class.
    """

    images: str
    metric: str
    thresholds: npt.NDArray[np.float64]
    image: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    found: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    objects: npt.NDArray[np.int32]

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        _write(path, "matches-1", **{name: np.asarray(value) for name, value in vars(self).items()})

    @classmethod
    def read(cls, path: Path) -> DetectionMatches:
        """Read the file.

        Raises:
            DataError: If it is missing or damaged.
        """
        names = ("images", "metric", "thresholds", "image", "label", "found", "ignored", "objects")
        content = _read(path, "matches-1", names)
        found = cls(str(content["images"]), str(content["metric"]), *(content[name] for name in names[2:]))
        if not found._is_whole():
            raise DataError(f"{path}: damaged (its arrays do not fit each other)")
        return found

    def _is_whole(self) -> bool:
        num, detections = len(self.objects), len(self.image)
        each = (len(self.thresholds), detections)
        shapes = (
            self.objects.ndim == 2
            and self.label.shape == (detections,)
            and self.found.shape == self.ignored.shape == each
        )
        indices = ((self.image, num), (self.label, self.objects.shape[-1]))
        return num > 0 and shapes and all(bool(((index >= 0) & (index < most)).all()) for index, most in indices)

    def is_like(self, other: DetectionMatches) -> bool:
        """Whether both have the same images, object counts, IoU thresholds and metric, and so can be compared."""
        same = self.images == other.images and self.metric == other.metric
        return (
            same and np.array_equal(self.objects, other.objects) and np.array_equal(self.thresholds, other.thresholds)
        )


PIXELS = "pixels.npz"


@dataclass(frozen=True, eq=False)
class PixelCounts:
    """How a segmentation network answered every test image; IoU of any resampling of the images follows from it.

    Attributes:
        images: Identity of the test split.
        agreed: (N, C) int64, pixels of each class where answer and label agree.
        answered: (N, C) int64, pixels of the answer.
        labelled: (N, C) int64, pixels of the label.
    """

    images: str
    agreed: npt.NDArray[np.int64]
    answered: npt.NDArray[np.int64]
    labelled: npt.NDArray[np.int64]

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        _write(path, "pixels-1", **{name: np.asarray(value) for name, value in vars(self).items()})

    @classmethod
    def read(cls, path: Path) -> PixelCounts:
        """Read the file.

        Raises:
            DataError: If it is missing or damaged.
        """
        content = _read(path, "pixels-1", ("images", "agreed", "answered", "labelled"))
        found = cls(str(content["images"]), content["agreed"], content["answered"], content["labelled"])
        shape = found.agreed.shape
        fits = len(shape) == 2 and shape[0] > 0 and found.answered.shape == found.labelled.shape == shape
        if not fits or (found.agreed > np.minimum(found.answered, found.labelled)).any() or (found.agreed < 0).any():
            raise DataError(f"{path}: damaged (its arrays do not fit each other)")
        return found

    def iou(self, weights: npt.NDArray[np.float64] | None = None) -> npt.NDArray[np.float64]:
        """(C,) intersection over union, each image counted with its weight; NaN for a class without pixels."""
        sums = [
            (one if weights is None else one * weights[:, None]).sum(axis=0).astype(np.float64)
            for one in (self.agreed, self.answered, self.labelled)
        ]
        union = sums[1] + sums[2] - sums[0]
        found: npt.NDArray[np.float64] = np.divide(sums[0], union, out=np.full_like(union, np.nan), where=union > 0)
        return found

    def mean_iou(self, weights: npt.NDArray[np.float64] | None = None) -> float:
        """mIoU in percent, over the classes that have pixels."""
        return 100 * float(np.nanmean(self.iou(weights)))


def _write(path: Path, form: str, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, format=np.array(form), **arrays)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))


def _read(path: Path, form: str, names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    if not path.exists():
        raise DataError(f"{path}: no such file; a run with save_predictions: true has one when it is finished")
    payload = io.BytesIO(read_run_file(path, MAX_FILE))
    try:
        with zipfile.ZipFile(payload) as archive:
            # A small archive can unpack to terabytes (a zip bomb), so add up the sizes before NumPy reads it.
            size = sum(info.file_size for info in archive.infolist())
        if size > MAX_UNPACKED:
            raise DataError(f"{path}: unpacks to {size:,} bytes; at most {MAX_UNPACKED:,} are read")
        with np.load(payload, allow_pickle=False) as content:
            if str(content["format"]) != form:
                raise DataError(f"{path}: of the format {content['format']}, {form} was expected")
            return {name: content[name] for name in names}
    except ValueError:  # NumPy could read it only as a pickle, which can run code
        raise DataError(f"{path}: damaged (not a NumPy archive of numbers)") from None
    except DataError:
        raise
    except Exception as error:  # on a damaged file NumPy's reader raises many types
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error})") from None
