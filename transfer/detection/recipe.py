"""The typed recipe of detection transfer: MoCo's protocol on VOC and COCO (arXiv:1911.05722, appendix)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import override

from mixmask.engine.config import Recipe, added, operational
from mixmask.transfer.detection.detectors import AnyDetector
from mixmask.transfer.detection.detectors.c4 import C4Recipe

Step = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=32)]


class DetectionData(Recipe):
    """Where the pictures and their boxes are.

    VOC: ``root`` is a VOCdevkit and a split is ``2007/trainval`` (VOC2007/ImageSets/Main/trainval.txt). COCO: a split is
    ``train2017``: the folder train2017, and annotations/instances_train2017.json or, for keypoints,
    annotations/person_keypoints_train2017.json. ``classes: null`` takes the names found in the annotations.
    ``allow_overlap`` permits pictures that are in both splits, for example to see a detector overfit.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    root: str = operational(..., min_length=1)
    train: tuple[str, ...] = Field(min_length=1)
    test: tuple[str, ...] = Field(min_length=1)
    classes: tuple[str, ...] | None = None
    num_workers: int = operational(4, ge=0)
    allow_overlap: bool = added(False)

    @model_validator(mode="after")
    def _listed_once(self) -> DetectionData:
        for key in ("train", "test", "classes"):
            values = getattr(self, key) or ()
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{key} lists '{twice[0]}' twice")
        both = sorted(set(self.train) & set(self.test))
        if both and not self.allow_overlap:
            raise ValueError(
                f"train and test both list '{both[0]}': a score on it would mean nothing; allow_overlap: true allows it"
            )
        return self


class DetectRecipe(Recipe):
    """Detection transfer.

    ``lr``, ``iterations``, ``milestones`` and ``warmup_iterations`` are given for ``reference_batch_size`` images per
    iteration. Another ``batch_size`` scales the learning rate linearly and the lengths inversely; a null reference
    turns scaling off. ``detector`` is the detector built on the trunk. ``test_batch_size`` pictures
    are tested at a time; padding them to one size changes detections a little. ``save_predictions`` keeps the detections
    of the test pictures, ``save_detector`` the trained network.
    """

    moved: ClassVar[Mapping[str, str]] = {"rpn": "detector.rpn", "roi": "detector.roi"}

    protocol: Literal["detect_voc", "detect_coco"]
    engine: Literal["torchvision", "detectron2"] = "torchvision"
    data: DetectionData
    batch_size: int = Field(16, ge=1)
    reference_batch_size: int | None = Field(16, ge=1)
    lr: float = Field(0.02, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    iterations: int = Field(ge=1)
    milestones: tuple[Step, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_iterations: int = Field(1000, ge=0)
    warmup_factor: float = Field(0.001, ge=0, le=1)
    clip_norm: float | None = Field(None, gt=0)
    min_size_train: tuple[Side, ...] = Field(min_length=1)
    max_size_train: int = Field(1333, ge=32)
    min_size_test: int = Field(800, ge=32)
    max_size_test: int = Field(1333, ge=32)
    test_batch_size: int = added(1, ge=1)
    precise_bn_iterations: int = Field(200, ge=0)
    detector: AnyDetector = C4Recipe()
    save_predictions: bool = operational(True)
    save_detector: bool = operational(False)

    @field_validator("detector", mode="before")
    @classmethod
    def _usual_detector(cls, value: object) -> object:
        return {"kind": "c4", **value} if isinstance(value, Mapping) else value

    @override
    def first_form(self, identity: dict[str, Any]) -> dict[str, Any]:
        # C4's keys were keys of the recipe before there was a choice of detectors: fingerprints stay what they were.
        detector = dict(identity["detector"])
        if detector.pop("kind") != "c4":
            return identity
        return {**{key: value for key, value in identity.items() if key != "detector"}, **detector}

    @model_validator(mode="after")
    def _keypoints_are_in_coco(self) -> DetectRecipe:
        if self.detector.sigmas and not self.coco:
            raise ValueError(f"detector: {self.detector.kind}: VOC has no keypoints; protocol: detect_coco has")
        return self

    @property
    def coco(self) -> bool:
        """Whether the data are COCO's json, and the measure is COCO's; else VOC's."""
        return self.protocol == "detect_coco"

    @property
    def measures(self) -> tuple[str, ...]:
        """What is measured, in COCO's names: ``bbox``, ``segm``, ``keypoints``."""
        return self.detector.measures if self.coco else ("bbox",)

    @property
    def masks(self) -> bool:
        """Whether a mask head is trained (Mask R-CNN on COCO)."""
        return "segm" in self.measures

    def coco_file(self, split: str) -> Path:
        """The annotations of a split of COCO."""
        kind = "person_keypoints" if "keypoints" in self.measures else "instances"
        return Path(self.data.root).expanduser() / "annotations" / f"{kind}_{split}.json"

    @property
    def scale(self) -> float:
        """Batch size divided by the reference batch size; 1 without a reference."""
        return self.batch_size / (self.reference_batch_size or self.batch_size)

    @property
    def scaled_lr(self) -> float:
        """Learning rate at this batch size."""
        return self.lr * self.scale

    @property
    def warmup_in_force(self) -> int:
        """Warm-up iterations at this batch size, at most up to the first milestone or the end of training."""
        return self.scaled_length(min(self.warmup_iterations, self.iterations, *self.milestones))

    def scaled_length(self, iterations: int) -> int:
        """Scale a number of iterations to this batch size: at least 1, but 0 stays 0."""
        return max(1, round(iterations / self.scale)) if iterations else 0
