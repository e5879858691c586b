"""Our random resized crops against FFCV's (libffcv/ffcv, ffcv/fields/rgb_image.py and tests/test_rrc.py)."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mixmask.engine.crops import CropRecipe, crop_and_flip, draw_crop, draw_crops
from tests.foreign.clones import clone, module_of

ROOT = clone("ffcv")
SIZES = [(300, 500), (500, 300), (97, 61), (32, 32), (8, 400), (400, 8), (1, 1), (375, 500), (224, 1000)]
# The last ones never fit into oblong images: the largest crop that is allowed is taken.
RANGES = [
    ((0.08, 1.0), (3 / 4, 4 / 3)),
    ((0.2, 1.0), (3 / 4, 4 / 3)),
    ((0.5, 0.5), (1.0, 2.0)),
    ((0.99, 1.0), (0.95, 1.05)),
]


class Anything(ModuleType):
    """A module with whatever is imported from it: what is compiled there is not run here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *given: None, "__setitem__": lambda self, key, value: None})


def placed(context: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        context.setitem(sys.modules, name, Anything(name))


@pytest.fixture(scope="module")
def crops() -> Iterator[Any]:
    """Their module with the crops, from the clone."""
    with pytest.MonkeyPatch.context() as context:
        placed(context, "cv2", "numba", "numba.typed", "ffcv", "ffcv.fields", "ffcv.fields.base", "ffcv.libffcv")
        placed(
            context, *(f"ffcv.pipeline{one}" for one in ("", ".operation", ".state", ".compiler", ".allocation_query"))
        )
        for package in ("ffcv", "ffcv.fields"):
            sys.modules[package].__path__ = [str(ROOT.joinpath(*package.split(".")))]
        yield importlib.import_module("ffcv.fields.rgb_image")
        del sys.modules["ffcv.fields.rgb_image"]


class Draws(random.Random):
    """The same numbers for both sides, one after the other."""

    def __init__(self, numbers: list[float]) -> None:
        super().__init__(0)
        self.numbers = iter(numbers)

    def random(self) -> float:
        return 1.0  # of the flip, which theirs does elsewhere

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * next(self.numbers)

    def randrange(self, *bounds: int) -> int:
        return int(next(self.numbers) * bounds[0])


def theirs(crops: Any, draws: Any, size: tuple[int, int], scale: Any, ratio: Any) -> tuple[int, ...]:
    with pytest.MonkeyPatch.context() as context:
        context.setattr(np.random, "uniform", draws.uniform)
        return tuple(int(one) for one in crops.get_random_crop(*size, np.array(scale), np.array(ratio)))


@pytest.mark.parametrize(("scale", "ratio"), RANGES)
def test_one_crop_in_a_worker(crops: Any, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    recipe = CropRecipe(scale=scale, aspect=ratio)
    rng = random.Random(0)
    for size in SIZES:
        for _ in range(50):
            numbers = [rng.random() for _ in range(22)]
            *ours, flip = draw_crop(*size, recipe, Draws(numbers))
            assert tuple(ours) == theirs(crops, Draws(numbers), size, scale, ratio), size
            assert not flip


class DrawnAtOnce:
    """For theirs, the numbers of ours, which are drawn for all ten attempts: area, aspect, top and left."""

    def __init__(self, drawn: list[list[float]]) -> None:
        self.drawn, self.attempt, self.which = drawn, -1, 1

    def uniform(self, low: float, high: float) -> float:
        place = type(low) is int  # a place is drawn from 0 on; area and aspect are between floating-point numbers
        if place:
            self.which += 1
        else:
            self.which = 1 - self.which
            self.attempt += self.which == 0
        return low + (high - low) * self.drawn[self.which][self.attempt]


@pytest.mark.parametrize(("scale", "ratio"), RANGES)
def test_crops_of_a_batch(crops: Any, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    sizes = SIZES * 50
    ours = draw_crops(torch.tensor(sizes), scale, ratio, torch.Generator().manual_seed(0))
    drawn = torch.rand(4, len(sizes), 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size, own, numbers in zip(sizes, ours.tolist(), drawn.transpose(0, 1).tolist(), strict=True):
        assert tuple(own) == theirs(crops, DrawnAtOnce(numbers), size, scale, ratio), size


def test_a_crop_of_one_colour_keeps_it() -> None:
    """Their test of the pixels: images of one value each, of many sizes, cropped at random to 160 pixels."""
    with pytest.MonkeyPatch.context() as context:
        placed(context, "assertpy", "ffcv", "ffcv.transforms", "ffcv.transforms.ops", "ffcv.fields", "ffcv.writer")
        placed(context, "ffcv.fields.rgb_image", "ffcv.loader", "ffcv.pipeline", "ffcv.pipeline.compiler")
        images = module_of(ROOT / "tests" / "test_rrc.py").DummyDataset(12, (300, 500))
    np.random.seed(0)  # noqa: NPY002 -- their code draws from it
    for number in range(len(images)):
        index, pixels = images[number]
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        crop = draw_crops(torch.tensor([pixels.shape[:2]]), *RANGES[0], torch.Generator().manual_seed(number))
        for interpolation in ("bilinear", "bicubic"):
            ours = 255 * crop_and_flip(image, crop, torch.tensor([True]), 160, interpolation)
            assert ours.shape == (1, 3, 160, 160)
            assert torch.allclose(ours, torch.full_like(ours, index % 255), atol=1e-3)
