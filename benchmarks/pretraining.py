"""What MixMask costs on top of MoCo, and what the loader's cores do per image.

    python -m benchmarks.pretraining [--size 224] [--batch 16] [--repeats 5] [--out benchmarks/results/pretraining.json]

Two questions, each with its peer in the same run, A and B interleaved, medians and the range of the repetitions:

- step: a MixMask training step over a vanilla MoCo step of ResNet-50 (by network passes 7 / 4 = 1.75);
- data: images/s of decode + two random crops + flips on one core, over the bare decode + two resizes on the same files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from engine.augment import CropRecipe
from engine.backbones import BackboneRecipe
from engine.datasets import DataRecipe, ImageSet, decode
from engine.loader import BatchPlan, StreamSource
from engine.precision import autocast, fast_bf16
from engine.records import environment
from engine.storage import write_text
from pretrain.frameworks.moco import MoCo, MoCoRecipe
from pretrain.mixing import MixMask, NoMix
from pretrain.recipe import PretrainRecipe, SGDRecipe
from pretrain.stage import step_losses

CPU = torch.device("cpu")


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(first: Callable[[], object], second: Callable[[], object], repeats: int) -> dict[str, object]:
    first(), second()
    a, b = [], []
    for _ in range(repeats):
        a.append(seconds(first))
        b.append(seconds(second))
    ratios = [y / x for x, y in zip(a, b)]
    return {
        "first_seconds": statistics.median(a),
        "second_seconds": statistics.median(b),
        "second_over_first": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


def step(size: int, batch: int, repeats: int) -> dict[str, object]:
    precision = "bf16" if fast_bf16(CPU) else "fp32"
    calls = []
    for mix in (NoMix(), MixMask(grid=8)):
        recipe = PretrainRecipe(
            name="bench",
            data=DataRecipe(name="bench", root="bench"),
            framework=MoCoRecipe(queue_size=64 * batch, bn_splits=2),
            mix=mix,
            optimizer=SGDRecipe(lr=0.01),
            epochs=1,
            batch_size=batch,
        )
        torch.manual_seed(0)
        model = MoCo(recipe.framework, BackboneRecipe()).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
        images = torch.randn(2, batch, 3, size, size)
        views = [view.contiguous(memory_format=torch.channels_last) for view in images]

        def call(model: MoCo = model, recipe: PretrainRecipe = recipe, optimizer: torch.optim.SGD = optimizer,
                 views: list[torch.Tensor] = views) -> None:  # fmt: skip
            with autocast(CPU, precision):
                loss = step_losses(model, recipe, views[0], views[1], 0)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        calls.append(call)
    result = interleaved(calls[0], calls[1], repeats)
    vanilla, mixmask = result["first_seconds"], result["second_seconds"]
    assert isinstance(vanilla, float)
    assert isinstance(mixmask, float)
    return {
        "question": "MixMask step over vanilla MoCo step, ResNet-50",
        "size": size,
        "batch": batch,
        "precision": precision,
        "vanilla_images_per_second": batch / vanilla,
        "mixmask_images_per_second": batch / mixmask,
        **result,
    }


def data(repeats: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(40):
            noise = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
            path = Path(folder) / f"{number}.jpg"
            Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)
            paths.append(path)
        images = ImageSet(tuple(paths), torch.zeros(40, dtype=torch.int64), ("x",), Path(folder))
        plan = BatchPlan(40, 40, True, seed=0)
        recipe = CropRecipe(crop=224, scale=(0.2, 1.0))

        def ours() -> None:
            for _ in StreamSource(images, 0, CPU).training(plan, recipe, 2, 0, 1):
                pass

        def bare() -> None:
            for path in paths:
                image = decode(path)
                for _ in range(2):
                    TF.resize(image, [224, 224], antialias=True)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        result = interleaved(bare, ours, repeats)
        torch.set_num_threads(threads)
    loader = result["second_seconds"]
    assert isinstance(loader, float)
    return {
        "question": "loader (decode, two random crops, flips) over bare decode and two resizes, one core, 500×375 JPEGs",
        "images_per_second": 40 / loader,
        **result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pretraining.json"))
    arguments = parser.parse_args()
    answers = [step(arguments.size, arguments.batch, arguments.repeats), data(arguments.repeats)]
    for answer in answers:
        print(f"{answer['question']}: {answer['second_over_first']:.2f} {answer['range']}")
    write_text(arguments.out, json.dumps({"environment": environment(), "answers": answers}, indent=2) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
