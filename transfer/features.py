"""Features of the frozen trunk, computed once for a protocol, or once for all protocols that share a cache."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from safetensors import SafetensorError

from mixmask.engine.collectives import gather_dealt
from mixmask.engine.config import Recipe, added, operational
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.distributed import agreed, any_of, from_first, on_rank0, world
from mixmask.engine.errors import ConfigError, NotWritable, RunDirectoryError
from mixmask.engine.features import extract_features
from mixmask.engine.images import ImageSet
from mixmask.engine.late import torch
from mixmask.engine.loader import open_source
from mixmask.engine.ownership import Owner
from mixmask.engine.precision import Precision
from mixmask.engine.progress import say
from mixmask.engine.storage import RunDirectory, write_atomic
from mixmask.transfer.classification import ClassifyRecipe, EvaluationRecipe, Images

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "features.safetensors"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # names in torch
PIECE = 1 << 14  # features of each process that are gathered at a time
POLL_SECONDS = 5.0  # between two looks at features that another job is extracting


class FeatureOptions(Recipe):
    """How frozen features are kept.

    ``feature_dtype`` is the number format they are rounded to. ``feature_cache`` is a folder for them: every run with the
    same backbone, images and test-time view reads the features that the first one wrote, whatever its protocol.
    """

    feature_dtype: Literal["fp32", "fp16", "bf16"] = added("fp32")
    feature_cache: str | None = operational(None, min_length=1)


class FrozenRecipe(FeatureOptions, ClassifyRecipe):
    """What protocols on frozen features share."""


class HasFeatures(Protocol):
    """What extraction asks of a recipe: a `ClassifyRecipe` with `FeatureOptions`."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def data(self) -> DataRecipe:
        """How images are read."""

    @property
    def evaluation(self) -> EvaluationRecipe:
        """The test-time view."""

    @property
    def precision(self) -> Precision:
        """Number format of the forward pass."""

    @property
    def feature_dtype(self) -> str:
        """A key of `DTYPES`."""

    @property
    def feature_cache(self) -> str | None:
        """A folder, or None."""


def frozen_features(
    recipe: HasFeatures,
    setting: Images,
    images: ImageSet,
    network: Callable[[], nn.Module],
    *,
    what: str = "trunk",
    gather: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features of all images, from the cache if they are there.

    Args:
        recipe: The test-time view, the precision, and how the features are kept.
        setting: The backbone and the device.
        images: All images; with several processes each extracts its share.
        network: Gives the network, on the device; not called if the features are in the cache.
        what: What the features are the output of; part of their identity in the cache.
        gather: Whether every process gets the features of all processes, or its share.

    Returns:
        (N, D) float32 features and the labels, on the device.
    """
    dtype = getattr(torch, DTYPES[recipe.feature_dtype])

    def extracted(gather: bool) -> tuple[Tensor, Tensor]:
        view = recipe.evaluation
        features, labels = extract_features(
            f"{recipe.name}: {len(images):,} features",
            network(),
            open_source(images.shard(), recipe.data, setting.device),
            batch_size=view.batch_size,
            resize=view.resize,
            crop=view.crop,
            precision=recipe.precision,
            normalization=setting.normalization,
            interpolation=view.interpolation,
            gather=gather,
        )
        return (features if dtype == torch.float32 else features.to(dtype).float()), labels

    if recipe.feature_cache is None:
        return extracted(gather)
    folder = Path(recipe.feature_cache).expanduser() / _identity(recipe, setting, images, what)
    features = _cached(
        recipe.name, folder, len(images), lambda: _gathered(extracted(gather=False)[0], len(images)).to(dtype)
    )
    mine = slice(None) if gather else slice(world().rank, None, world().size)
    return features[mine].to(setting.device).float(), images.labels[mine].to(setting.device)


def _identity(recipe: HasFeatures, setting: Images, images: ImageSet, what: str) -> str:
    """A name for features that changes with everything that can change them."""
    view = recipe.evaluation
    # Names and classes alone would not do: cars_train/00001.jpg and cars_test/00001.jpg may have one class, and the images
    # of a folder may be replaced. Sizes and times tell files apart without reading them.
    places, root = hashlib.sha256(), Path(recipe.data.roots[0]).expanduser()
    for path, state in zip(images.paths, images.states(), strict=True):
        places.update(os.fsencode(os.path.relpath(path, root)) + f" {state}\n".encode())
    identity = {
        "backbone": setting.source.info.fingerprint,
        "what": what,
        "data": recipe.data.name,
        "listing": images.summary()["listing"],
        "places": places.hexdigest(),
        "view": [view.resize, view.crop, view.interpolation],
        "normalization": setting.normalization
        if isinstance(setting.normalization, str)
        else setting.normalization.model_dump(mode="json"),
        **({} if recipe.data.levels is None else {"levels": recipe.data.levels}),
        "precision": recipe.precision,
        "dtype": recipe.feature_dtype,
        "storage": recipe.data.storage,  # resident images are resized on the device, and rounded otherwise
        "device": setting.device.type,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _cached(title: str, folder: Path, num: int, extract: Callable[[], Tensor]) -> Tensor:
    """The features in ``folder``, or new ones that are written there; one job at a time extracts, the others wait."""
    from safetensors.torch import save

    file, owner, waits, wrote = folder / FILE, Owner(RunDirectory(folder).owner_file), False, False

    def claimed() -> str:
        """Empty if this job may write; else who does."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"feature_cache={folder.parent}: cannot be written ({error.strerror})") from None
        try:
            owner.acquire()
        except NotWritable:
            raise
        except RunDirectoryError as error:
            return str(error)
        return ""

    def write(features: Tensor) -> None:
        content = save({"features": features.contiguous()})
        owner.require()
        write_atomic(file, lambda out: out.write(content))

    while True:
        found = _read(file, num)
        if not any_of(found is None):  # on every process: another job may have written it between two looks
            assert found is not None
            say(f"{title}: {num:,} features {'kept in' if wrote else 'from'} {folder}")
            return found
        other = from_first(agreed(lambda: claimed() if world().is_writer else ""))
        if other:  # another job extracts them: what it writes serves this one, too
            if not waits:
                say(f"{title}: waiting for features: {other}")
            waits = True
            time.sleep(POLL_SECONDS)
            continue
        try:
            if from_first(_read(file, num) is None):  # not written between the look and the lock
                features = extract()
                on_rank0(lambda: write(features))  # noqa: B023
                wrote = True
        finally:
            if world().is_writer:
                owner.release()


def _gathered(share: Tensor, num: int) -> Tensor:
    """(num, D) features of all processes on the first one's CPU, in pieces; nothing on the others.

    Args:
        share: (n, D) this process's rows: every size-th of all.
        num: Rows of all processes.
    """
    pieces = []
    for start in range(0, -(-num // world().size), PIECE):
        piece = gather_dealt(share[start : start + PIECE])  # rows dealt out in turn: pieces follow one another
        if world().is_writer:
            pieces.append(piece.cpu())
    return torch.cat(pieces) if pieces else share[:0].cpu()


def _read(file: Path, num: int) -> Tensor | None:
    """The features in a file; None if there is none, or it is damaged and must be written again."""
    from safetensors.torch import load_file

    if not file.is_file():
        return None
    try:
        features = load_file(file)["features"]
    except (SafetensorError, KeyError, OSError) as error:
        say(f"{file}: damaged ({error}); extracting the features again")
        return None
    if features.ndim != 2 or len(features) != num:
        say(f"{file}: holds {tuple(features.shape)} features, {num:,} were expected; extracting them again")
        return None
    return features
