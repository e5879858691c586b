"""Images/s of the loader, by cores, and how many cores the fastest step needs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typing_extensions import override

from mixmask.engine.augment import AugmentRecipe
from mixmask.engine.images import FileImages
from mixmask.engine.loader import BatchPlan, StreamSource
from mixmask.engine.precision import available_cores
from mixmask.launch.bench.machine import Machine
from mixmask.launch.bench.part import LeftOut, Part, Row

NUM = 256  # drawn pictures
BATCH = 32


class Loader(Part):
    """JPEGs of 500 × 375 pixels from this machine's disk cache: decoded once, two random views of 224 pixels each."""

    name = "loader"
    title = "Loader: images/s, two views of 224 pixels from JPEGs of 500 × 375"
    place = 4
    share = 0.1

    @override
    def measure(self, machine: Machine, before: dict[str, list[Row]]) -> Iterator[Row | LeftOut]:
        cores = available_cores()
        numbers = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
        if numbers[-1] != cores:
            numbers.append(cores)
        wanted = max((row.value for row in before.get("pretraining", ()) if "ResNet-50" in row.name), default=None)
        with tempfile.TemporaryDirectory() as folder:
            images = draw(Path(folder))
            measured: tuple[int, float] | None = None
            for number in numbers:
                if machine.left <= 0:
                    yield LeftOut(f"the loader with {number} cores", "the time was up")
                    continue
                rate = _rate(images, number)
                measured = number, rate
                said = "" if wanted is None else f"the fastest step of a ResNet-50 takes {wanted:,.0f} images/s"
                yield Row(f"{number} worker processes", rate, "images/s", limit=said, more={"per_core": rate / number})
        if wanted is not None and measured is not None:
            yield Row("cores that the fastest step needs", wanted * measured[0] / measured[1], "cores")


def draw(folder: Path) -> FileImages:
    """Noisy pictures, which take as long to decode as photographs of their size."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(NUM):
        noise = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(paths[-1], quality=92)
    return FileImages(tuple(paths), np.zeros(NUM, np.int64), ("drawn",), folder)


def _rate(images: FileImages, workers: int, seconds: float = 4.0) -> float:
    """Images/s, from the end of the first batches on, which wait for the processes to start."""
    source, recipe = StreamSource(images, workers, torch.device("cpu")), AugmentRecipe()
    plan = BatchPlan(NUM, BATCH, True, seed=0)
    batches = source.training(plan, [recipe, recipe], 0, 10**6)
    for _ in range(2 * workers + 1):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(batches)
        count += BATCH
    rate = count / (time.perf_counter() - started)
    del batches  # ends the processes
    return rate
