"""Batches of images: streamed from disk by worker processes, or resident on the device.

Both sources have the same two methods. The images are permuted anew in every epoch, and every crop is drawn from a seed
of its own, derived from the recipe's seed. A batch therefore depends on its step only: not on earlier steps, a restart,
or the number of workers.
"""

from __future__ import annotations

import importlib
import math
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from typing_extensions import override

from mixmask.engine.crops import CropRecipe, crop_and_flip, draw_crop, draw_crops
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.distributed import world
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.host_values import to_device
from mixmask.engine.images import REMEDY, ImageSet
from mixmask.engine.late import torch
from mixmask.engine.precision import available_cores
from mixmask.engine.progress import say
from mixmask.engine.randomness import derived_seed, generator
from mixmask.engine.stopping import outlive_stop_signals
from mixmask.engine.wording import nearest_multiples

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global training batch, on the device.

    Attributes:
        views: For each view (B, 3, crop, crop) uint8 (or float in [0, 1]), cropped and flipped, without photometric
            augmentation.
        labels: (B,) int64.
        step: The step it belongs to, from 0.
        rows: Position of each of these rows in the global batch.
        total: Rows of the global batch.
        number: Index of this part of the step, if gradients are accumulated over parts.
    """

    views: list[Tensor]
    labels: Tensor
    step: int
    rows: list[int]
    total: int
    number: int = 0

    def part(self, number: int, parts: int) -> Batch:
        """One of ``parts`` consecutive parts of equal size."""
        each = len(self.labels) // parts
        mine = slice(number * each, (number + 1) * each)
        views = [view[mine] for view in self.views]
        return Batch(views, self.labels[mine], self.step, self.rows[mine], self.total, number)


@dataclass(frozen=True)
class BatchPlan:
    """Which images each step takes.

    Attributes:
        num_images: Size of the data set.
        batch_size: Global batch size, in images per step.
        drop_last: Leave out an epoch's last, smaller batch. If it is kept, every rank gets the same number of its
            images, so up to world size - 1 images are left out. A last batch with fewer than two images per rank is
            left out (unless it is the only one), because batch normalisation has no statistics of a single image.
        seed: The recipe's seed.
        parts: Parts of a batch whose gradients are accumulated one after another (then `drop_last` must be set). Every
            part is shared by all ranks, so that it holds the same images with any world size.
    """

    num_images: int
    batch_size: int
    drop_last: bool
    seed: int
    parts: int = 1

    def __post_init__(self) -> None:
        if self.drop_last and self.batch_size > self.num_images:
            raise ConfigError(
                f"batch_size {self.batch_size} is larger than the data set of {self.num_images} images: "
                f"choose at most {self.num_images}"
            )
        if self.batch_size % world().size:
            size = world().size
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be shared equally by {size} processes; "
                f"{nearest_multiples(self.batch_size, size)}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        full, rest = divmod(self.num_images, self.batch_size)
        if self.drop_last:
            return full
        return full + (1 if rest // world().size > 1 or full == 0 else 0)

    def epoch_of(self, step: int) -> int:
        """The epoch a step falls in, from 0."""
        return step // self.steps_per_epoch

    def indices(self, epoch: int) -> list[list[int]]:
        """The image indices of every global batch of one epoch."""
        # A generator per epoch: a resumed run gets the order of its epoch without replaying the epochs before it.
        order = torch.randperm(self.num_images, generator=generator(self.seed, "order", epoch)).tolist()
        size = self.batch_size
        return [order[i * size : (i + 1) * size] for i in range(self.steps_per_epoch)]

    def share(self, batch: Sequence[int]) -> list[int]:
        """The rows of a global batch that belong to this rank: its share of the first part, of the second, and so on."""
        size = world().size
        each = len(batch) // self.parts // size * size
        mine = range(each)[world().share(each)]
        return [number * each + row for number in range(self.parts) for row in mine]

    def from_step(self, first: int, num_steps: int) -> Iterator[tuple[int, int, list[int]]]:
        """Yield (step, epoch, indices of the global batch) for the steps ``first`` … ``num_steps - 1``."""
        step = first
        while step < num_steps:
            epoch = self.epoch_of(step)
            for batch in self.indices(epoch)[step - epoch * self.steps_per_epoch :]:
                if step >= num_steps:
                    return
                yield step, epoch, batch
                step += 1


class ImageSource(Protocol):
    """A source of training and evaluation batches."""

    images: ImageSet

    def training(
        self, plan: BatchPlan, views: Sequence[CropRecipe], first_step: int, num_steps: int
    ) -> Iterator[Batch]:
        """Yield this rank's rows of the steps ``first_step`` … ``num_steps - 1``, with one random view per recipe."""
        ...

    def evaluation(
        self, batch_size: int, resize: int | None, crop: int, interpolation: Interpolation = "bilinear"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every image once, in order: central crops (B, 3, crop, crop) uint8 and their labels, on the device."""
        ...


def open_source(images: ImageSet, data: DataRecipe, device: torch.device) -> ImageSource:
    """Open the source that ``data.storage`` selects."""
    if data.storage == "resident":
        return ResidentSource(images, device)
    return StreamSource(images, data.num_workers, device)


def check_crop(images: ImageSet, data: DataRecipe, recipe: CropRecipe) -> None:
    """Check that ``storage: resident`` is possible: it can only enlarge crops, and all images must fit into memory.

    Raises:
        ConfigError: If a crop of the first image can be larger than its output, or if all images, at the first one's
            size, need more than this machine's memory.
    """
    if data.storage != "resident":
        return
    width, height = images.header(0)
    needed, memory = 3 * height * width * len(images), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ConfigError(
            f"{images.root}: {len(images):,} images of {width}×{height} pixels take {needed / 2**30:,.0f} GiB, this machine "
            f"has {memory / 2**30:,.0f}; use data.storage: stream"
        )
    largest = min(max(height, width), round(math.sqrt(height * width * recipe.scale[1] * recipe.aspect[1])))
    if largest > recipe.crop:
        raise ConfigError(
            f"a crop to {recipe.crop} pixels, but the images of {images.root} are {width}×{height} and crops of them up to "
            f"{largest}: data.storage: resident enlarges crops and never shrinks them; use a crop of at least {largest} or "
            f"data.storage: stream"
        )


# --- streamed --------------------------------------------------------------------------------------------------------


def from_workers(batches: Iterable[T]) -> Iterator[T]:
    """Yield the batches; a `DataError` from a worker process is raised again with its own message.

    Raises:
        DataError: With the worker's message only (torch puts the worker's traceback before it).
    """
    try:
        yield from batches
    except DataError as error:
        said = str(error.args[0]).rsplit(f"{DataError.__name__}: ", 1)[-1].strip()
        raise DataError(*said.splitlines(), REMEDY) from None


class _Views:
    """Item ``(epoch, index)`` is a list of random views of one image, each (3, crop, crop) uint8, and its label."""

    def __init__(self, images: ImageSet, recipes: Sequence[CropRecipe], seed: int) -> None:
        self.images, self.recipes, self.seed = images, recipes, seed

    def __getitem__(self, key: Any) -> tuple[list[Tensor], Tensor]:
        epoch, index = key
        image = self.images.read(index)
        views = []
        for view, recipe in enumerate(self.recipes):
            # A generator per crop: the draw does not depend on which worker loads the image, or on its earlier images.
            rng = random.Random(derived_seed(self.seed, "crop", epoch, index, view))
            top, left, height, width, flip = draw_crop(image.shape[1], image.shape[2], recipe, rng)
            # Decoded images are channels-last in memory; keeping the crop so makes its resize a third faster.
            cut = image[None, :, top : top + height, left : left + width]
            cut = cut.contiguous(memory_format=torch.channels_last)
            cut = _resized(cut, [recipe.crop, recipe.crop], recipe.interpolation)[0]
            views.append(cut.flip(-1) if flip else cut)
        return views, self.images.labels[index]


class _Central:
    """Item i is a list with one view of image i (short side resized, central crop, uint8), and its label."""

    def __init__(self, images: ImageSet, resize: int | None, crop: int, interpolation: Interpolation) -> None:
        self.images, self.resize, self.crop, self.interpolation = images, resize, crop, interpolation

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor]:
        image = _central(self.images.read(index), self.resize, self.crop, self.interpolation)
        return [image], self.images.labels[index]

    def __len__(self) -> int:
        return len(self.images)


def _central(image: Tensor, resize: int | None, crop: int, interpolation: Interpolation) -> Tensor:
    from torchvision.transforms.v2.functional import center_crop

    if resize is not None:
        image = _resized(image, [resize], interpolation)
    return image if tuple(image.shape[-2:]) == (crop, crop) else center_crop(image, [crop, crop])


def _resized(image: Tensor, size: list[int], interpolation: Interpolation) -> Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    resized: Tensor = resize(image, size, InterpolationMode(interpolation), antialias=True)
    return resized


def _collate(items: list[tuple[list[Tensor], Tensor]]) -> tuple[list[Tensor], Tensor]:
    views, labels = zip(*items)
    # The images are channels-last. Stacking them in that order costs the loader's cores no transposition.
    stacked = [torch.stack([image.permute(1, 2, 0) for image in view]).permute(0, 3, 1, 2) for view in zip(*views)]
    return stacked, torch.stack(labels)


@cache
def useful_workers(num_workers: int) -> int:
    """``num_workers``, but at most the number of available cores; if that is less, the user is told once.

    The number of workers changes neither the images nor their order.
    """
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    cores = available_cores()
    if num_workers > cores:
        say(f"data.num_workers={num_workers}: this machine has {cores} cores, so {cores} workers are started")
    return min(num_workers, cores)


class StreamSource(ImageSource):
    """Images decoded by worker processes in every epoch."""

    def __init__(self, images: ImageSet, num_workers: int, device: torch.device) -> None:
        self.images, self.num_workers, self.device = images, useful_workers(num_workers), device

    def _load(self, dataset: _Views | _Central, batches: Any) -> Iterator[tuple[list[Tensor], Tensor]]:
        # Workers inherit what their parent has imported; otherwise each of them would import it in every pass.
        importlib.import_module("torchvision.io")
        importlib.import_module("torchvision.transforms.v2.functional")
        images: Any = dataset  # of no base class: DataLoader needs the methods alone
        loader: Any = torch.utils.data.DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_collate,
            # Only a copy from pinned memory to the GPU is asynchronous (non_blocking below).
            pin_memory=self.device.type == "cuda",
            worker_init_fn=outlive_stop_signals,
        )
        for views, labels in from_workers(loader):
            yield [view.to(self.device, non_blocking=True) for view in views], labels.to(self.device, non_blocking=True)

    @override
    def training(
        self, plan: BatchPlan, views: Sequence[CropRecipe], first_step: int, num_steps: int
    ) -> Iterator[Batch]:
        # The loader reads these keys ahead of the batches it returns, so the loop below walks the plan a second time.
        keys = (
            [(epoch, index) for index in map(batch.__getitem__, plan.share(batch))]
            for _, epoch, batch in plan.from_step(first_step, num_steps)
        )
        loaded = self._load(_Views(self.images, views, plan.seed), keys)
        for (step, _, batch), (images, labels) in zip(plan.from_step(first_step, num_steps), loaded, strict=True):
            yield Batch(images, labels, step, plan.share(batch), len(batch))

    @override
    def evaluation(
        self, batch_size: int, resize: int | None, crop: int, interpolation: Interpolation = "bilinear"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = list(range(len(self.images)))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for images, labels in self._load(_Central(self.images, resize, crop, interpolation), batches):
            yield images[0], labels


# --- resident --------------------------------------------------------------------------------------------------------


class ResidentSource(ImageSource):
    """A small data set, decoded once and kept on the device as uint8."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.images, self.device = images, device
        pixels = images.array()
        self.pixels = (_decoded(images) if pixels is None else pixels).to(device)
        self.labels = images.labels.to(device)

    @override
    def training(
        self, plan: BatchPlan, views: Sequence[CropRecipe], first_step: int, num_steps: int
    ) -> Iterator[Batch]:
        height, width = self.pixels.shape[-2:]
        for step, _, batch in plan.from_step(first_step, num_steps):
            rows = plan.share(batch)
            where = to_device(torch.tensor([batch[row] for row in rows]), self.device)
            pixels = self.pixels[where]
            size = torch.tensor([height, width]).expand(len(batch), 2)
            cut = []
            for number, recipe in enumerate(views):
                # Drawn for the global batch and then sliced, so that the crops do not depend on the world size.
                rng = generator(plan.seed, "crops", step, number)
                crops = draw_crops(size, recipe.scale, recipe.aspect, rng)
                flips = torch.rand(len(batch), generator=rng) < recipe.flip
                cut.append(crop_and_flip(pixels, crops[rows], flips[rows], recipe.crop, recipe.interpolation))
            yield Batch(cut, self.labels[where], step, rows, len(batch))

    @override
    def evaluation(
        self, batch_size: int, resize: int | None, crop: int, interpolation: Interpolation = "bilinear"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), batch_size):
            pixels = self.pixels[start : start + batch_size]
            yield _central(pixels, resize, crop, interpolation), self.labels[start : start + batch_size]


def _decoded(images: ImageSet) -> Tensor:
    first = images.read(0)
    pixels = torch.empty((len(images), *first.shape), dtype=torch.uint8)

    def fill(row: int) -> None:
        image, path = images.read(row), images.paths[row]
        if image.shape != first.shape:
            raise DataError(
                f"{path}: is {image.shape[2]}×{image.shape[1]} pixels where {images.paths[0].name} is "
                f"{first.shape[2]}×{first.shape[1]}. data.storage: resident needs images of one size; "
                f"use data.storage: stream"
            )
        pixels[row] = image

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Iterating over the results raises here what a thread has raised.
        for _ in pool.map(fill, range(len(images))):
            pass
    return pixels


def num_batches(num_images: int, batch_size: int) -> int:
    """Batches of one pass over a data set, the last one possibly smaller."""
    return math.ceil(num_images / batch_size)
