"""Training crops and test images for segmentation, each with draws of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from typing_extensions import override

from mixmask.engine.distributed import world
from mixmask.engine.loader import BatchPlan, from_workers, useful_workers
from mixmask.engine.randomness import generator
from mixmask.engine.stopping import outlive_stop_signals
from mixmask.transfer.segmentation.dataset import IGNORED, SegmentationSet, read_image
from mixmask.transfer.segmentation.recipe import SegmentationAugment, SegmentationTraining

TRIES = 10  # at a crop without too much of one class


def fitted(width: int, height: int, bounds: Sequence[float]) -> tuple[int, int]:
    """(width, height) as large as fits (long side, short side), the aspect ratio kept (mmcv's ``imrescale``)."""
    longest, shortest = bounds
    scale = min(longest / max(width, height), shortest / min(width, height))
    return int(width * scale + 0.5), int(height * scale + 0.5)


def resized(image: Tensor, labels: Tensor | None, width: int, height: int) -> tuple[Tensor, Tensor | None]:
    """An image, bilinearly without smoothing (OpenCV's default), and its label map, by nearest neighbours."""
    image = TF.resize(image, [height, width], antialias=False)
    if labels is not None:
        labels = F.interpolate(labels[None, None].float(), (height, width), mode="nearest")[0, 0].to(labels.dtype)
    return image, labels


def augmented(
    image: Tensor, labels: Tensor, recipe: SegmentationAugment, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One training view.

    Args:
        image: (3, H, W) uint8.
        labels: (H, W) uint8.
        recipe: The augmentation.
        rng: Where the draws come from.

    Returns:
        (3, crop, crop) uint8, (crop, crop) uint8, and (crop, crop) bool: which pixels are the image's, not its padding.
    """

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    factor = draw(*recipe.factor)
    size = fitted(image.shape[2], image.shape[1], [side * factor for side in recipe.resize])
    larger, small = resized(image, labels, *size)
    assert small is not None
    side = recipe.crop
    for attempt in range(TRIES):
        top = int(draw(0, 1) * (max(larger.shape[1] - side, 0) + 1))
        left = int(draw(0, 1) * (max(larger.shape[2] - side, 0) + 1))
        cut = small[top : top + side, left : left + side]
        if recipe.most_of_one_class is None or attempt == TRIES - 1:
            break
        counts = torch.bincount(cut[cut != IGNORED].flatten().long())
        if (counts > 0).sum() > 1 and float(counts.max() / counts.sum()) < recipe.most_of_one_class:
            break
    pixels = larger[:, top : top + side, left : left + side]
    if draw(0, 1) < recipe.flip:
        pixels, cut = pixels.flip(2), cut.flip(1)
    if recipe.jitter:
        pixels = jittered(pixels, rng)
    missing = (0, side - pixels.shape[2], 0, side - pixels.shape[1])
    real = F.pad(torch.ones(pixels.shape[1:], dtype=torch.bool), missing)
    return F.pad(pixels, missing), F.pad(cut, missing, value=IGNORED), real


def jittered(image: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each with probability 1/2, contrast first or last (SSD, arXiv:1512.02325).

    The strengths are those of mmsegmentation's ``PhotoMetricDistortion``. Saturation is torchvision's, which blends with
    grey.
    """

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    def changed(image: Tensor, scale: float, shift: float) -> Tensor:
        return (image.float() * scale + shift).clamp(0, 255).to(torch.uint8)

    chosen = [draw(0, 1) < 0.5 for _ in range(5)]
    brightness, contrast, saturation, hue = draw(-32, 32), draw(0.5, 1.5), draw(0.5, 1.5), draw(-0.1, 0.1)
    first = chosen[4]
    if chosen[0]:
        image = changed(image, 1, brightness)
    if chosen[1] and first:
        image = changed(image, contrast, 0)
    if chosen[2]:
        image = TF.adjust_saturation(image, saturation)
    if chosen[3]:
        image = TF.adjust_hue(image, hue)
    if chosen[1] and not first:
        image = changed(image, contrast, 0)
    return image


Crops = tuple[Tensor, Tensor, Tensor]


class _Crops(Dataset[Crops]):
    """Item (step, row, index) is the view of an image at a row of the batch of a step."""

    def __init__(self, images: SegmentationSet, recipe: SegmentationTraining, seed: int) -> None:
        self.images, self.recipe, self.seed = images, recipe, seed

    @override
    def __getitem__(self, key: tuple[int, int, int]) -> Crops:
        step, row, index = key
        one = self.images.images[index]
        labels = torch.from_numpy(self.images.labels_of(one))
        rng = generator(self.seed, "segmentation-view", step, row)
        return augmented(read_image(one.image), labels, self.recipe.augment, rng)


def training_batches(
    images: SegmentationSet, recipe: SegmentationTraining, seed: int, first: int
) -> Iterator[list[Tensor]]:
    """This rank's share of the batches from step ``first`` on: crops, labels, and which pixels are no padding.

    A step's batch depends neither on where the run started nor on the world size.
    """
    plan = BatchPlan(len(images), recipe.batch_size, drop_last=True, seed=seed)
    rows = world().share(recipe.batch_size)

    def keys() -> Iterator[list[tuple[int, int, int]]]:
        for step, _, indices in plan.from_step(first, recipe.iterations):
            yield [(step, row, indices[row]) for row in range(rows.start, rows.stop)]

    loader: DataLoader[Crops] = DataLoader(
        _Crops(images, recipe, seed),
        batch_sampler=keys(),
        num_workers=useful_workers(recipe.data.num_workers),
        worker_init_fn=outlive_stop_signals,
    )
    yield from from_workers(loader)


T = TypeVar("T")
TestImage = tuple[Tensor, Tensor, int]


class _Whole(Dataset[TestImage]):
    """Item n is the n-th image of this rank's share, its label map, and its index."""

    def __init__(self, images: SegmentationSet, recipe: SegmentationTraining) -> None:
        self.images, self.recipe = images, recipe
        self.indices = range(world().rank, len(images), world().size)

    @override
    def __getitem__(self, number: int) -> TestImage:
        index = self.indices[number]
        one = self.images.images[index]
        image = read_image(one.image)
        if self.recipe.evaluation.resize is not None:
            image, _ = resized(image, None, *fitted(image.shape[2], image.shape[1], self.recipe.evaluation.resize))
        return image, torch.from_numpy(np.array(self.images.labels_of(one))), index

    def __len__(self) -> int:
        return len(self.indices)


def _unchanged(item: T) -> T:
    return item


def test_images(images: SegmentationSet, recipe: SegmentationTraining) -> Iterator[TestImage]:
    """This rank's share of the test images, each once, with their label maps."""
    loader: DataLoader[TestImage] = DataLoader(
        _Whole(images, recipe),
        batch_size=None,
        num_workers=useful_workers(recipe.data.num_workers),
        collate_fn=_unchanged,
        worker_init_fn=outlive_stop_signals,
    )
    yield from from_workers(loader)
