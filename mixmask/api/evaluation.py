"""Evaluate any network: kNN, a linear probe, or the features themselves.

A network is any `torch.nn.Module` that maps (N, 3, H, W) normalised images to (N, D) features, or to (N, D, h, w) maps,
which are averaged. Invalid arguments or data raise `mixmask.UserError`.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mixmask.api import Place
from mixmask.engine.backbones import channels_of
from mixmask.engine.config import checked_recipe
from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe, require_same_classes
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.features import extract_features as features_of
from mixmask.engine.images import ImageSet
from mixmask.engine.knn import knn_predict, top1
from mixmask.engine.loader import open_source
from mixmask.engine.normalization import Normalization
from mixmask.engine.precision import Precision
from mixmask.engine.preflight import find_splits
from mixmask.engine.storage import RunDirectory
from mixmask.transfer.classification import ClassifyRecipe
from mixmask.transfer.protocol import Setting
from mixmask.transfer.protocols.knn import KnnRecipe
from mixmask.transfer.protocols.linear import LinearRecipe
from mixmask.transfer.selection import require_held_out

R = TypeVar("R", bound=ClassifyRecipe)


@dataclass(frozen=True)
class Features:
    """Features of labelled images.

    Attributes:
        values: (N, D) float32, as the network gives them, on its device.
        labels: (N,) int64, indices into ``classes``, on the same device.
        classes: Class names, sorted.
        paths: The images, in order.
    """

    values: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    paths: tuple[Path, ...]


@contextlib.contextmanager
def _measured(model: nn.Module, size: int) -> Iterator[_Pooled]:
    """Wrap a network for evaluation; afterwards the mode of every module and each ``requires_grad`` are restored."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: a torch.nn.Module was expected, got {type(model).__name__}; mixmask.load_backbone(path) loads a file"
        )
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield _Pooled(model, size)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, wanted in gradients.items():
            parameter.requires_grad_(wanted)


class _Pooled(nn.Module):
    """Wraps any network: averages feature maps to one (D,) row per image, and finds D with a trial forward pass."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network = network
        weight = next(network.parameters(), torch.zeros(()))
        # The engine takes the device from a network's parameters, and a network may have none of its own.
        self.place = nn.Parameter(torch.zeros((), device=weight.device), requires_grad=False)
        with torch.no_grad():
            try:
                output = self.eval()(torch.zeros(2, channels_of(network), size, size, device=weight.device))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"model: fails on images of {size}×{size} pixels ({error}); crop=… chooses their size"
                ) from error
            self.num_features = output.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images)
        if not isinstance(output, Tensor) or output.ndim not in (2, 4):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(f"the model gives {shape}; (N, D) features or (N, D, h, w) maps were expected")
        return output.mean(dim=(2, 3)) if output.ndim == 4 else output


def extract_features(
    model: nn.Module,
    data: Place | ImageSet,
    *,
    split: str = "train",
    holdout: float = 0.0,
    labels: bool = True,
    resize: int | None = 256,
    crop: int = 224,
    batch_size: int = 64,
    normalization: Normalization | None = None,
    precision: Precision = "fp32",
) -> Features:
    """Features of every image's central crop, computed in eval mode.

    Args:
        model: Any network; see the module.
        data: A folder of class folders, alone or in ``train/`` and ``val/``, or anything else that ``mixmask check-data``
            reads (a .zip file, a list of paths, packed shards, parquet files, a known archive); or images.
        split: ``train``, or the name of the test folder.
        holdout: If there is no test folder, the share of every class that is held out as ``test``; ``train`` is the
            rest.
        labels: Whether folders are classes. Without, all images below ``data`` are read.
        resize: Short side in pixels before the crop; None leaves the image.
        crop: Side of the central crop.
        batch_size: Images per forward pass.
        normalization: Data set whose mean and standard deviation are used; by default the model's own
            (`load_backbone`), else ImageNet's.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    >>> found = extract_features(mixmask.load_backbone(backbone), photos, resize=None, crop=32)
    >>> found.values.shape, len(found.classes)
    (torch.Size([120, 512]), 10)
    """
    if isinstance(data, str | os.PathLike):
        root = Path(data).expanduser()
        if split != "train" and not holdout and split not in find_splits(root, labels=labels):
            raise DataError(f"{root}: has no {split}/; holdout=0.2 keeps a fifth of every class for testing")
        recipe = _recipe(root, None if split == "train" or holdout else split, holdout, labels)
        images = open_split(recipe, "train" if split == "train" else "test")
    else:
        images = data
    with _measured(model, crop) as pooled:
        values, found = _features(pooled, images, resize, crop, batch_size, _of(model, normalization), precision)
    return Features(values, found, images.classes, images.paths)


def knn(
    model: nn.Module,
    root: Place,
    *,
    k: int = 20,
    temperature: float = 0.1,
    holdout: float = 0.2,
    resize: int | None = 256,
    crop: int = 224,
    batch_size: int = 64,
    normalization: Normalization | None = None,
    precision: Precision = "fp32",
) -> float:
    """kNN top-1 of a network in percent: cosine similarity, votes weighted with exp(similarity / temperature).

    Args:
        model: Any network; see the module.
        root: A folder of class folders, alone or in ``train/`` and ``val/`` (or ``test/``), or an archive that is known.
        k: Number of neighbours.
        temperature: Softness of the weights.
        holdout: The share of every class that is held out for testing if there is no test folder.
        resize: As `extract_features` takes it, and so are the following.
        crop: In pixels.
        batch_size: Images at a time.
        normalization: A data set's mean and standard deviation.
        precision: Number format of the network.

    Raises:
        UserError: If the data are missing or damaged, or fewer than ``k``.

    >>> 0 <= knn(mixmask.load_backbone(backbone), photos, resize=None, crop=32) <= 100
    True
    """
    train, test, data = _splits(Path(root).expanduser(), holdout)
    asked_for = {"k": k, "temperature": temperature, "precision": precision, "normalization": normalization}
    recipe = _recipe_of(KnnRecipe, "knn", data, asked_for, resize, crop, batch_size)
    if recipe.k > len(train):
        raise ConfigError(f"k {k} is larger than the {len(train)} training images of {root}")
    with _measured(model, crop) as pooled:
        (bank, labels), (asked, answers) = (
            _features(pooled, images, resize, crop, batch_size, _of(model, normalization), precision)
            for images in (train, test)
        )
    predicted = knn_predict(
        bank, labels, asked, num_classes=len(train.classes), k=recipe.k, temperature=recipe.temperature
    )
    return top1(predicted, answers)


def linear_probe(
    model: nn.Module,
    root: Place,
    *,
    lr: float | Sequence[float] = (0.01, 0.1, 1.0, 10.0),
    batch_norm: bool | Sequence[bool] = (False, True),
    epochs: int = 30,
    seed: int = 0,
    holdout: float = 0.2,
    resize: int | None = 256,
    crop: int = 224,
    batch_size: int = 64,
    normalization: Normalization | None = None,
    precision: Precision = "fp32",
) -> float:
    """Top-1 in percent of a linear classifier on a network's features, which are computed once.

    The classifier is trained with SGD as in the protocol ``linear``, on the central crop of every image. The learning
    rate is divided by 10 after 60 % and after 80 % of the epochs.

    Args:
        model: Any network; see the module. It is not changed.
        root: As `knn` takes it.
        lr: Learning rate, or several. MoCo's published 30 suits normalised networks and long training.
        batch_norm: Whether BatchNorm without affine parameters stands before the classifier, or both. Of all combinations,
            the best one on a tenth of every class of the *training* images is tested.
        epochs: Length of the training.
        seed: Seed of the classifier's initial weights and of the order of the images.
        holdout: As `knn` takes it.
        resize: As `extract_features` takes it, and so are the following.
        crop: In pixels.
        batch_size: Images at a time, also for the training.
        normalization: A data set's mean and standard deviation.
        precision: Number format of the network.

    >>> 0 <= linear_probe(mixmask.load_backbone(backbone), photos, epochs=2, resize=None, crop=32) <= 100
    True
    """
    train, test, data = _splits(Path(root).expanduser(), holdout)
    rates = {
        "seed": seed,
        "augment": None,
        "lr": lr if isinstance(lr, float | int) else [*lr],
        "batch_norm": batch_norm if isinstance(batch_norm, bool) else [*batch_norm],
        "batch_size": min(batch_size, max(2, len(train) - len(train) // 5)),
        "epochs": epochs,
        "milestones": [*dict.fromkeys(max(1, round(epochs * share)) for share in (0.6, 0.8))],
        "precision": precision,
        "normalization": normalization,
        "save_predictions": False,
    }
    recipe = _recipe_of(LinearRecipe, "linear", data, rates, resize, crop, batch_size)
    if len(recipe.probes) > 1:
        require_held_out(train, recipe.held_out, recipe.seed)
    with _measured(model, crop) as pooled, tempfile.TemporaryDirectory() as folder:
        state = {name: value.detach().cpu().clone() for name, value in pooled.state_dict().items()}
        run = RunDirectory(Path(folder) / "probe")
        run.create(recipe, "probe")
        listing = {"train": train.summary()["listing"], "test": test.summary()["listing"]}
        no_file: Any = None  # a network in memory comes from nowhere
        train, test = (images.with_decoding(channels_of(model)) for images in (train, test))
        setting = Setting(run, "probe", listing, pooled.place.device, no_file, train, test, _of(model, normalization))
        found = recipe.probe(setting, lambda: pooled, state)
    return found["linear/top1"]


def _recipe_of(
    kind: type[R],
    protocol: str,
    data: DataRecipe,
    keys: Mapping[str, Any],
    resize: int | None,
    crop: int,
    batch_size: int,
) -> R:
    """Validate the arguments as the command line does.

    Raises:
        ConfigError: With the argument, what was given and what would be valid.
    """
    evaluation = {"resize": resize, "crop": crop, "batch_size": batch_size}
    rest = {"protocol": protocol, "name": protocol, "backbone": "in memory", "data": data, "evaluation": evaluation}
    return checked_recipe(kind, {**rest, **keys}, protocol)


def _of(model: nn.Module, normalization: Normalization | None) -> Normalization:
    found: Normalization = getattr(model, "normalization", "imagenet")
    return normalization or found


def _features(
    pooled: _Pooled,
    images: ImageSet,
    resize: int | None,
    crop: int,
    batch_size: int,
    normalization: Normalization,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    taken = images.with_decoding(channels_of(pooled))
    source = open_source(taken, _recipe(images.root), pooled.place.device)
    return features_of(
        "features", pooled, source, batch_size=batch_size, resize=resize, crop=crop, precision=precision,
        normalization=normalization,
    )  # fmt: skip


def _recipe(root: Path, test: str | None = None, holdout: float = 0.0, labels: bool = True) -> DataRecipe:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", root.name) or "data"
    workers = min(4, os.cpu_count() or 1)
    keys = {"name": name, "root": str(root), "test": test, "holdout": holdout, "num_workers": workers, "labels": labels}
    return checked_recipe(DataRecipe, keys, "data")


def _splits(root: Path, holdout: float) -> tuple[ImageSet, ImageSet, DataRecipe]:
    """Open the training and test images: separate folders, or the only one with a part of it held out."""
    splits = find_splits(root)
    test = next((name for name in ("val", "test") if name in splits), None)
    if test is not None and "train" not in splits:
        raise DataError(f"{root}: has {test}/ and no train/")
    data = _recipe(root, test, 0.0 if test is not None else holdout)
    train, tested = open_split(data, "train"), open_split(data, "test")
    require_same_classes(train, tested)
    if train.targets.ndim == 2:
        raise DataError(
            f"{root}: its images have several labels each; `mixmask transfer logreg` and svm_voc07 can measure them"
        )
    return train, tested, data
