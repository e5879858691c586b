"""What a trained classifier does on shifted images, and whether its confidence is right; nothing is trained."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator
from typing_extensions import override

from mixmask.engine.collectives import gather_dealt
from mixmask.engine.config import operational
from mixmask.engine.data import open_split
from mixmask.engine.data.folder import class_folders, image_folder
from mixmask.engine.datasets import OpenImages
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.images import FileImages, ImageSet
from mixmask.engine.knn import top1
from mixmask.engine.late import torch
from mixmask.engine.progress import say
from mixmask.transfer.checkpoints.source import Source
from mixmask.transfer.classification import ClassifyRecipe, Images, save_answers, seen_as_in_tests
from mixmask.transfer.classifier_file import ClassifierInfo, load_classifier, read_info

if TYPE_CHECKING:
    from torch import Tensor

# Errors of AlexNet, the mean over the five severities (hendrycks/robustness; arXiv:1903.12261): what mCE is relative to.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = ("1", "2", "3", "4", "5")
RESERVED = ("top1", "ece", "mCE", "error")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class RobustnessRecipe(ClassifyRecipe):
    """Accuracy of a saved classifier on its own test images and on others, and its expected calibration error (ECE).

    ``classifier`` is the ``classifier.safetensors`` of a linear probe or of finetuning with ``save_classifier: true``;
    ``backbone`` is the backbone that it was trained from. ``sets`` maps names to folders of class folders: ImageNet-V2
    (folders 0 … 999), -A, -R, -Sketch. On a set with some of the classes, only these are answered. ``corruptions`` is
    ImageNet-C's folder (``<corruption>/<severity>/<class>``); mCE is relative to AlexNet's errors. ECE has ``bins`` bins of
    equal width (arXiv:1706.04599), on the test images.
    """

    depends_on_seed: ClassVar[bool] = False

    takes_any_channels: ClassVar[bool] = False

    protocol: Literal["robustness"]
    classifier: str = operational(..., min_length=1)
    classifier_fingerprint: str = Field("", description="of the run that trained it; read from the file")
    sets: dict[Name, str] = operational({})
    set_names: tuple[str, ...] = Field(
        (), description="of `sets`, and whether there are corruptions; set by themselves"
    )
    corruptions: str | None = operational(None, min_length=1)
    bins: int = Field(15, ge=1, le=10_000)

    @model_validator(mode="before")
    @classmethod
    def _identity(cls, given: Any) -> Any:
        """Folders may lie anywhere; the classifier and the names of the sets are what identifies a run."""
        if not isinstance(given, dict) or not isinstance(given.get("classifier"), str):
            return given
        info = read_info(Path(given["classifier"]).expanduser())
        own = {"resize": info.resize, "crop": info.crop, "interpolation": info.interpolation}
        asked = given.get("evaluation")
        asked = asked if isinstance(asked, dict) else asked.model_dump() if isinstance(asked, BaseModel) else {}
        other = [key for key, value in own.items() if key in asked and asked[key] != value]
        if other:
            raise ValueError(
                f"evaluation.{other[0]}: is the classifier's own ({own[other[0]]}); leave it out (given: {asked[other[0]]})"
            )
        sets = given.get("sets") or {}
        names = sorted(sets) if isinstance(sets, dict) else []
        taken = [name for name in names if name in RESERVED]
        if taken:
            raise ValueError(f"sets: '{taken[0]}' is the name of a metric; give the set another one")
        return {
            **given,
            "classifier_fingerprint": info.fingerprint,
            "set_names": [*names, *(["corruptions"] if given.get("corruptions") else [])],
            "evaluation": {**asked, **own},
        }

    @cached_property
    def info(self) -> ClassifierInfo:
        """What the classifier's file says of itself."""
        return read_info(Path(self.classifier).expanduser())

    @property
    @override
    def title(self) -> str:
        return "robustness"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        # mCE and ECE are recorded, too, but tables mark the highest number as best, and of errors the lowest is.
        return {
            "robustness/top1": "clean top-1",
            **{f"robustness/{name}": f"{name} top-1" for name in sorted(self.sets)},
        }

    @override
    def settings(self, train: ImageSet) -> dict[str, Any]:
        return {"classifier": self.info.protocol, "classifier_run": self.info.fingerprint, "ece_bins": self.bins}

    @override
    def check(self, source: Source, device: torch.device) -> None:
        if self.info.parent != source.info.fingerprint:
            raise ConfigError(
                f"classifier {self.classifier}: was trained from another backbone ({self.info.parent}) than {source.path} "
                f"({source.info.fingerprint}); give the backbone that its run was given"
            )

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[Any, ImageSet]:
        info = self.info
        test = open_images(self.data, "test")
        if test.targets.ndim == 2 or test.classes != info.classes:
            raise DataError(
                f"{test.root}: its {len(test.classes)} classes are not the {len(info.classes)} that {self.classifier} was "
                f"trained for ({info.dataset})"
            )
        shifted = {
            name: _shifted(name, Path(folder).expanduser(), info.classes) for name, folder in sorted(self.sets.items())
        }
        if self.corruptions is not None:
            for corruption, severity, images in _corrupted(Path(self.corruptions).expanduser(), info.classes):
                shifted[f"{corruption}/{severity}"] = images
        # Nothing is trained. In place of training images stand the shifted ones: they are checked and identified like these.
        return ShiftedImages(test, shifted) if shifted else test, test

    def measure(self, setting: Images) -> dict[str, float]:
        """Top-1 on every set, mCE, and ECE, in percent."""
        model, info = load_classifier(Path(self.classifier).expanduser(), setting.device)

        def logits_of(title: str, images: ImageSet, resize: int | None) -> tuple[Tensor, Tensor]:
            view = self.evaluation.model_copy(update={"resize": resize})
            found = [torch.empty(0, len(info.classes), device=setting.device)]  # a process may have no image
            answers = [torch.empty(0, dtype=torch.int64, device=setting.device)]
            for logits, labels in seen_as_in_tests(title, model, images, self, own, view):
                found.append(logits.float())
                answers.append(labels)
            return gather_dealt(torch.cat(found)), gather_dealt(torch.cat(answers))

        own = replace(setting, normalization=info.normalization)
        usual = self.evaluation.resize
        logits, labels = logits_of(f"{self.name}: test images", setting.test, usual)
        save_answers(self, setting, logits.argmax(dim=1), labels)
        found = {"robustness/top1": top1(logits.argmax(dim=1), labels)}
        found["robustness/ece"] = 100 * calibration_error(logits, labels, self.bins)
        for name, folder in sorted(self.sets.items()):
            images = _shifted(name, Path(folder).expanduser(), info.classes)
            found[f"robustness/{name}"] = accuracy(*logits_of(f"{self.name}: {name}", images, usual))
        if self.corruptions is not None:
            errors: dict[str, list[float]] = {}
            for corruption, severity, images in _corrupted(Path(self.corruptions).expanduser(), info.classes):
                # ImageNet-C's images have the network's size already; hendrycks/robustness cuts their centre only.
                right = accuracy(*logits_of(f"{self.name}: {corruption} {severity}", images, None))
                errors.setdefault(corruption, []).append(100 - right)
            for corruption, values in errors.items():
                found[f"robustness/error/{corruption}"] = sum(values) / len(values)
            relative = [sum(values) / len(values) / ALEXNET[corruption] for corruption, values in errors.items()]
            found["robustness/mCE"] = sum(relative) / len(relative)
        said = (f"{name.split('/')[-1]} {value:.2f}" for name, value in found.items() if name.count("/") < 2)
        say(f"{self.name}: {', '.join(said)}")
        return found


@dataclass(frozen=True)
class ShiftedImages:
    """All images beside the classifier's own test images, as one split.

    Attributes:
        own: The classifier's own test images.
        sets: The others, by name.
    """

    own: ImageSet
    sets: Mapping[str, FileImages]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classifier's classes."""
        return self.own.classes

    def __len__(self) -> int:
        return sum(map(len, self.sets.values()))

    def summary(self) -> dict[str, str | int]:
        """The count, and a digest of the names of all sets, of their images and of the sizes of these files."""
        return {"num_images": len(self), "listing": self._listing}

    @cached_property
    def _listing(self) -> str:
        digest = hashlib.sha256()
        for name, images in self.sets.items():
            digest.update(f"{name} {images.summary()['listing']}\n".encode())
            # The copies of an image in several sets have one name.
            digest.update(" ".join(str(path.stat().st_size) for path in images.paths).encode())
        return digest.hexdigest()[:16]

    def check(self) -> None:
        """Look for damaged files in every set.

        Raises:
            DataError: If there are any; names them.
        """
        for images in self.sets.values():
            images.check()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 in percent. Where only some classes occur in (N,) labels, the answer is the best of these."""
    present = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    present[labels] = True
    predicted = logits.masked_fill(~present, -torch.inf).argmax(dim=1)
    return 100.0 * float((predicted == labels).double().mean())


def calibration_error(logits: Tensor, labels: Tensor, bins: int) -> float:
    """Expected calibration error in [0, 1] (arXiv:1706.04599, equation 3).

    Args:
        logits: (N, C).
        labels: (N,) int64.
        bins: Bins of equal width of the confidence, each closed at its upper end.
    """
    confidence, predicted = logits.softmax(dim=1).double().max(dim=1)
    right = (predicted == labels).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    gap.index_add_(0, which, right - confidence)
    return float(gap.abs().sum() / len(labels))


def _shifted(name: str, folder: Path, classes: tuple[str, ...]) -> FileImages:
    """A folder of class folders, with the classifier's labels; folders 0, 1, … are numbers of classes (ImageNet-V2)."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (sets.{name})")
    images = image_folder(folder)
    numbered = all(re.fullmatch(r"\d{1,6}", one) for one in images.classes) and images.classes != classes
    names = [str(number) for number in range(len(classes))] if numbered else classes
    index = {one: number for number, one in enumerate(names)}
    strange = [one for one in images.classes if one not in index]
    if strange:
        raise DataError(
            f"{folder}: {len(strange)} of its class folders are not classes of the classifier: {', '.join(strange[:3])} "
            f"(sets.{name})"
        )
    place = np.array([index[one] for one in images.classes], np.int64)
    return FileImages(images.paths, place[images.targets], classes, folder)


def _corrupted(folder: Path, classes: tuple[str, ...]) -> list[tuple[str, str, FileImages]]:
    """Every corruption and severity of ImageNet-C; also where they lie in folders such as ``noise/``."""
    places = {
        path.name: path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.name in ALEXNET
    }
    missing = [name for name in ALEXNET if name not in places]
    if missing:
        there = ", ".join(class_folders(folder)[:5]) if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: mCE needs all 15 corruptions; missing: {', '.join(missing)} (found: {there})")
    found = []
    for name in ALEXNET:
        for severity in SEVERITIES:
            part = places[name] / severity
            if not part.is_dir():
                raise DataError(f"{part}: no such folder; every corruption has the severities 1 to 5")
            found.append((name, severity, _shifted("corruptions", part, classes)))
    return found
