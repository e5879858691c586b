"""Linear SVMs on frozen features of multi-label images, with all images and with a few of every class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from typing_extensions import override

from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.distributed import agreed, from_first, world
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.images import ImageSet
from mixmask.engine.precision import available_cores
from mixmask.engine.progress import say, track
from mixmask.transfer.classification import Images, trunk_of
from mixmask.transfer.features import FrozenRecipe, frozen_features

Array = npt.NDArray[Any]
MANY = 2000  # training images from which on the classes are shared out to processes
Cost = Annotated[float, Field(gt=0, le=1e12)]
Shots = Annotated[int, Field(ge=1, le=10**6)]


class SvmVoc07Recipe(FrozenRecipe):
    """A linear SVM for each class of VOC 2007 (arXiv:1905.01235, section 6.1; the settings are those of VISSL's config).

    Features are divided by their norm. Squared hinge loss, positives count twice, and C is chosen for each class by the
    average precision of a ``folds``-fold cross-validation on the training images. Images in which a class is difficult count
    neither way for it. The headline is the mean AP at 11 recalls (VOC 2007); ``svm/mAP_area`` is the area under the curve,
    which VISSL prints.

    ``low_shot``: SVMs from k positive images of each class and k from every other class as negatives, averaged over
    ``low_shot_samples`` draws, with C = ``low_shot_c``. (Published low-shot numbers take the C that is best on the test
    images; this one is fixed beforehand.)
    """

    multi_label: ClassVar[bool] = True

    protocol: Literal["svm_voc07"]
    costs: tuple[Cost, ...] = Field((0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000), min_length=1)
    folds: int = Field(3, ge=2, le=100)
    max_iter: int = Field(2000, ge=1, le=10**7)
    low_shot: tuple[Shots, ...] = (1, 2, 4, 8, 16, 32, 64, 96)
    low_shot_samples: int = Field(5, ge=1, le=1000)
    low_shot_c: Cost = 1.0

    @property
    @override
    def title(self) -> str:
        return "SVM"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        return {"svm/mAP": "SVM mAP"}

    @override
    def settings(self, train: ImageSet) -> dict[str, Any]:
        return {"C": f"best of {len(self.costs)} by {self.folds}-fold cross-validation", "mAP": "11-point"}

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[ImageSet, ImageSet]:
        train, test = super().open(open_images)
        if train.targets.ndim == 1:
            raise ConfigError(
                f"protocol svm_voc07: the images of '{self.data.name}' have one label each, and this protocol measures mAP "
                f"of multi-label images; use logreg or linear"
            )
        for value, which in ((0, "is absent from"), (1, "is in")):
            fewest, name = min(zip((train.targets == value).sum(axis=0).tolist(), train.classes, strict=True))
            if fewest < self.folds:
                raise DataError(
                    f"{train.root}: class '{name}' {which} {fewest} images, and {self.folds} folds need one each"
                )
        if self.low_shot and fewest < max(self.low_shot):
            raise ConfigError(
                f"low_shot {max(self.low_shot)}: class '{name}' is in {fewest} training images of '{self.data.name}' only; "
                f"low_shot=[{', '.join(str(k) for k in self.low_shot if k <= fewest)}] would do"
            )
        return train, test

    def measure(self, setting: Images) -> dict[str, float]:
        """Mean AP on the test images, in percent, of SVMs on all training images and on a few of every class."""
        (features, labels), (asked, answers) = (
            [_numpy(part) for part in frozen_features(self, setting, images, lambda: trunk_of(setting).eval())]
            for images in (setting.train, setting.test)
        )

        # scikit-learn works on the CPU, and on all of its cores: one process does it for all.
        def work() -> dict[str, float]:
            if not world().is_writer:
                return {}
            return self._found(_unit(features), labels, _unit(asked), answers, setting.train.classes)

        return from_first(agreed(work))

    def _found(
        self, features: Array, labels: Array, asked: Array, answers: Array, classes: Sequence[str]
    ) -> dict[str, float]:
        num_classes = labels.shape[1]
        from joblib import Parallel, delayed

        from mixmask.transfer.svm_fits import low_shot, one_class  # imports scikit-learn

        # liblinear draws from one generator per process, so that fits in threads would disturb each other. Processes pay
        # for themselves on real data only.
        workers = available_cores() if len(features) >= MANY else 1
        parallel = Parallel(n_jobs=workers, return_as="generator")
        work = (delayed(one_class)(self, label, features, labels, asked, answers) for label in range(num_classes))
        done = list(track(f"{self.name}: classes", parallel(work), num_classes, len(features)))
        costs, points, areas = zip(*done, strict=True)
        found = {"svm/mAP": 100 * float(np.mean(points)), "svm/mAP_area": 100 * float(np.mean(areas))}
        say(f"{self.name}: SVM mAP {found['svm/mAP']:.2f} % (11-point), {found['svm/mAP_area']:.2f} % (area)")
        draws = [(k, sample) for k in self.low_shot for sample in range(self.low_shot_samples)]
        shots = (delayed(low_shot)(self, k, sample, features, labels, asked, answers) for k, sample in draws)
        scores = list(track(f"{self.name}: low-shot draws", parallel(shots), len(draws), 1)) if draws else []
        for k in self.low_shot:
            values = [score for (shot, _), score in zip(draws, scores, strict=True) if shot == k]
            found[f"svm/low_shot/{k}"] = float(np.mean(values))
            found[f"svm/low_shot_std/{k}"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        found.update({f"svm/AP/{name}": 100 * float(own) for name, own in zip(classes, points, strict=True)})
        found.update({f"svm/chosen_C/{name}": float(cost) for name, cost in zip(classes, costs, strict=True)})
        return found


def _numpy(tensor: Any) -> Array:
    found: Array = tensor.cpu().numpy()
    return found


def _unit(features: Array) -> Array:
    wide = features.astype(np.float64)
    found: Array = wide / (np.linalg.norm(wide, axis=1, keepdims=True) + 1e-5)
    return found
