"""Annotated pictures in one form, whatever files they come from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mixmask.engine.errors import DataError
from mixmask.transfer.detection.data.keypoints import Keypoints

Outline = npt.NDArray[np.float64]
Points = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """One annotated object.

    Attributes:
        box: Left, top, right, bottom in continuous pixels (VOC's 1-based corners are shifted by one).
        label: Index into the classes.
        polygons: Outlines, each a (2n,) float64 array of alternating x and y (COCO has millions of points). Empty
            without masks.
        difficult: VOC's flag: neither counted nor punished in evaluation.
        crowd: COCO's flag: not trained on.
        keypoints: (K, 3) x, y and COCO's flag (0: not labelled, 1: hidden, 2: visible); None without keypoints.
    """

    box: tuple[float, float, float, float]
    label: int
    polygons: tuple[Outline, ...] = ()
    difficult: bool = False
    crowd: bool = False
    keypoints: Points | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image file with its objects. ``key`` is VOC's name or COCO's image id."""

    key: str
    path: Path
    width: int
    height: int
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class DetectionSet:
    """Pictures of one split and what their labels mean.

    ``source`` holds the COCO json files (none for VOC); ``category_ids`` COCO's id of each class; ``keypoints`` what the
    keypoints are, if they are read.
    """

    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]
    source: tuple[Path, ...] = ()
    category_ids: tuple[int, ...] = ()
    keypoints: Keypoints | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def summary(self) -> dict[str, str | int]:
        """Counts, and under ``listing`` a digest of all picture keys and annotations."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            digest.update(picture.key.encode())
            for i in picture.instances:
                digest.update(repr((i.box, i.label, i.difficult, i.crowd)).encode())
                for outline in i.polygons:
                    digest.update(outline.tobytes())
                if i.keypoints is not None:
                    digest.update(i.keypoints.tobytes())
        objects = sum(len(picture.instances) for picture in self.pictures)
        return {"num_images": len(self), "num_objects": objects, "listing": digest.hexdigest()[:16]}

    def check(self) -> None:
        """Does nothing: `open_detection` has already checked every image file and annotation."""

    def uncounted_classes(self) -> list[str]:
        """Classes without an object that counts in the evaluation (difficult ones and crowds do not)."""
        counted = {i.label for picture in self.pictures for i in picture.instances if not (i.difficult or i.crowd)}
        return [name for label, name in enumerate(self.classes) if label not in counted]

    def for_training(self, masks: bool) -> DetectionSet:
        """Without crowds, and without pictures that then have no object (Detectron2's FILTER_EMPTY_ANNOTATIONS).

        With keypoints, pictures without a labelled one are left out, too (MIN_KEYPOINTS_PER_IMAGE).

        Args:
            masks: Leave out objects without a usable polygon, too.

        Raises:
            DataError: If nothing is left.
        """
        kept = []
        for picture in self.pictures:
            instances = tuple(i for i in picture.instances if not i.crowd and (i.polygons or not masks))
            labelled = any(i.keypoints is not None and (i.keypoints[:, 2] > 0).any() for i in instances)
            if instances and (labelled or self.keypoints is None):
                kept.append(replace(picture, instances=instances))
        if not kept:
            what = "an annotated object" if self.keypoints is None else "an object with a labelled keypoint"
            raise DataError(f"none of the {len(self)} training pictures has {what}")
        return replace(self, pictures=tuple(kept))
