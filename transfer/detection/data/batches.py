"""Training and test batches for detection: shortest-edge resize on uint8, flips, aspect-ratio grouping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mixmask.engine.distributed import world
from mixmask.engine.errors import DataError
from mixmask.engine.loader import from_workers, useful_workers
from mixmask.engine.randomness import generator
from mixmask.engine.stopping import outlive_stop_signals
from mixmask.transfer.detection.data.pictures import DetectionSet, Instance
from mixmask.transfer.detection.detector import Targets
from mixmask.transfer.detection.layers.boxes import nonempty
from mixmask.transfer.detection.recipe import DetectRecipe

T = TypeVar("T")


@dataclass(frozen=True)
class DetectionBatch:
    """Images (3, H, W) uint8 of one iteration, resized and maybe flipped, and their objects."""

    images: list[Tensor]
    targets: list[Targets]


def read_rgb(path: Path) -> Image.Image:
    """An image as RGB, turned as its EXIF orientation says.

    Raises:
        DataError: If it is truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            upright: Image.Image = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable image ({error})") from None


def shortest_edge(width: int, height: int, short: int, longest: int) -> tuple[int, int]:
    """(width, height) with the short side at ``short``, or less if the long side would exceed ``longest``."""
    scale = short / min(width, height)
    new_width, new_height = (short, scale * height) if width < height else (scale * width, short)
    if max(new_width, new_height) > longest:
        shrink = longest / max(new_width, new_height)
        new_width, new_height = new_width * shrink, new_height * shrink
    return int(new_width + 0.5), int(new_height + 0.5)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


class _Training(Dataset[tuple[Tensor, Targets]]):
    """Item (step, index) is one picture, resized and flipped with draws of its own."""

    def __init__(self, pictures: DetectionSet, recipe: DetectRecipe, seed: int) -> None:
        self.pictures, self.recipe, self.seed = pictures, recipe, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Targets]:
        step, index = key
        picture = self.pictures.pictures[index]
        rng = generator(self.seed, "detection-view", step, index)
        choices = self.recipe.min_size_train
        short = choices[int(torch.randint(len(choices), (), generator=rng))]
        flip = bool(torch.rand((), generator=rng) < 0.5)
        image = read_rgb(picture.path)
        before = image.size
        width, height = shortest_edge(*before, short, self.recipe.max_size_train)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        scale = torch.tensor([width / before[0], height / before[1]], dtype=torch.float64)
        boxes = torch.tensor([i.box for i in picture.instances], dtype=torch.float64).reshape(-1, 4) * scale.repeat(2)
        polygons = [
            [(np.asarray(p).reshape(-1, 2) * scale.numpy()) for p in instance.polygons]
            for instance in picture.instances
        ]
        pixels = _to_tensor(image)
        if flip:
            pixels = pixels.flip(2)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
            polygons = [[np.stack([width - p[:, 0], p[:, 1]], axis=1) for p in one] for one in polygons]
        limits = torch.tensor([width, height, width, height], dtype=torch.float64)
        boxes = torch.minimum(boxes.clamp(min=0), limits).float()
        # The threshold of Detectron2's filter_empty_instances.
        keep = nonempty(boxes, 1e-5)
        labels = torch.tensor([i.label for i in picture.instances], dtype=torch.int64)
        points = None
        if self.pictures.keypoints is not None:
            mirrored = self.pictures.keypoints.mirrored if flip else None
            points = _moved(picture.instances, scale, width, height, mirrored)[keep]
        kept = [[p.ravel().tolist() for p in one] for one, good in zip(polygons, keep.tolist(), strict=True) if good]
        return pixels, Targets(boxes[keep], labels[keep], kept, points)


def _moved(instances: Sequence[Instance], scale: Tensor, width: int, height: int, mirrored: list[int] | None) -> Tensor:
    """(G, K, 3) keypoints in the resized picture; those that are not labelled, or not in it, are zeros.

    Args:
        instances: Of the picture.
        scale: (2,) of x and y.
        width: Of the resized picture.
        height: Likewise.
        mirrored: Which keypoint is at the place of each in the mirrored picture; None if it is not mirrored.
    """
    points = torch.stack([torch.from_numpy(i.keypoints) for i in instances if i.keypoints is not None])
    points[..., :2] *= scale
    if mirrored is not None:
        points[..., 0] = width - points[..., 0]
        points = points[:, mirrored]
    x, y, flag = points.unbind(dim=2)
    there = (x >= 0) & (x <= width) & (y >= 0) & (y <= height) & (flag > 0)
    return (points * there[..., None]).float()


def _grouped(pictures: DetectionSet, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of pictures that are all wide or all tall, which need little padding; a new order every epoch.

    The global batch of a step is of one kind, whatever the world size; Detectron2 groups each rank's share by itself.
    """
    wide = [picture.width > picture.height for picture in pictures.pictures]
    # Pictures that do not fill a batch wait for the next epoch.
    waiting: dict[bool, list[int]] = {True: [], False: []}
    epoch = 0
    while True:
        for index in torch.randperm(len(pictures), generator=generator(seed, "detection-order", epoch)).tolist():
            group = waiting[wide[index]]
            group.append(index)
            if len(group) == batch_size:
                yield list(group)
                group.clear()
        epoch += 1


def _keys(
    pictures: DetectionSet, recipe: DetectRecipe, seed: int, first: int, last: int
) -> Iterator[list[tuple[int, int]]]:
    for step, batch in enumerate(_grouped(pictures, recipe.batch_size, seed)):
        if step >= last:
            return
        # Earlier batches are drawn and skipped: a resumed run gets those of an uninterrupted one.
        if step >= first:
            yield [(step, index) for index in batch[world().share(recipe.batch_size)]]


def _collate(items: list[tuple[Tensor, Targets]]) -> DetectionBatch:
    return DetectionBatch([image for image, _ in items], [target for _, target in items])


def training_batches(
    pictures: DetectionSet, recipe: DetectRecipe, seed: int, first: int, last: int
) -> Iterator[DetectionBatch]:
    """This rank's share of the batches of the steps ``first`` … ``last - 1``.

    A step's batch depends neither on where the run started nor on the world size.
    """
    loader: DataLoader[tuple[Tensor, Targets]] = DataLoader(
        _Training(pictures, recipe, seed),
        batch_sampler=_keys(pictures, recipe, seed, first, last),
        num_workers=useful_workers(recipe.data.num_workers),
        collate_fn=_collate,
        worker_init_fn=outlive_stop_signals,
    )
    yield from from_workers(loader)


TestImage = tuple[Tensor, int, tuple[int, int]]  # the image, its index, and the (width, height) of its file


class _Testing(Dataset[list[TestImage]]):
    """Item n is the n-th batch of this rank's share of the pictures."""

    def __init__(self, pictures: DetectionSet, recipe: DetectRecipe) -> None:
        self.pictures, self.recipe = pictures, recipe
        # Without padding, unlike DistributedSampler: each picture is evaluated once.
        self.indices = list(range(world().rank, len(pictures), world().size))
        if recipe.test_batch_size > 1:  # wide ones together, and tall ones: they need little padding
            self.indices.sort(key=lambda index: pictures.pictures[index].width <= pictures.pictures[index].height)

    def __getitem__(self, number: int) -> list[TestImage]:
        size = self.recipe.test_batch_size
        return [self._image(index) for index in self.indices[number * size : (number + 1) * size]]

    def _image(self, index: int) -> TestImage:
        image = read_rgb(self.pictures.pictures[index].path)
        width, height = shortest_edge(*image.size, self.recipe.min_size_test, self.recipe.max_size_test)
        return _to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)), index, image.size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.recipe.test_batch_size)


def _unchanged(item: T) -> T:
    return item


def evaluation_batches(pictures: DetectionSet, recipe: DetectRecipe) -> Iterator[list[TestImage]]:
    """Batches of this rank's share of the pictures, each once, resized to (3, H, W) uint8."""
    loader: DataLoader[list[TestImage]] = DataLoader(
        _Testing(pictures, recipe),
        batch_size=None,
        num_workers=useful_workers(recipe.data.num_workers),
        collate_fn=_unchanged,
        worker_init_fn=outlive_stop_signals,
    )
    yield from from_workers(loader)
