"""What the training loop and the resident loader add to a step.

    python -m benchmarks.loop [--steps 30] [--repeats 5]

ResNet-18 with the CIFAR stem at 32 pixels, MoCo, batch 256 (128 without a GPU), on drawn pictures that live on the device:

- loop: seconds of a step of `engine.training.train` (losses, log, progress, checks) over those of a bare step on the same
  batch, one after the other in the same run, so that both meet the same state of the machine and of the heap;
- loader: the share of a step that waits for the loader (``data_wait_share`` of the log; the loader has no workers, so it is
  all of its work).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.measure import interleaved, parser, report
from mixmask.engine.array_images import ArrayImages
from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import load_recipe
from mixmask.engine.job import Job, Part
from mixmask.engine.loader import Batch, BatchPlan, ResidentSource
from mixmask.engine.precision import Precision, autocast, fast_bf16
from mixmask.engine.storage import RunDirectory
from mixmask.engine.training import train
from mixmask.pretrain.optimizers import build_optimizer
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.step import batch_parts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def show_help() -> None:
    subprocess.run([sys.executable, "-m", "mixmask", "--help"], capture_output=True, check=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(repeats=5)
    arguments.add_argument("--steps", type=int, default=30)
    given = arguments.parse_args()
    steps = given.steps
    batch_size = 256 if DEVICE.type == "cuda" else 128
    precision: Precision = "bf16" if fast_bf16(DEVICE) else "fp32"
    recipe = load_recipe(
        PretrainRecipe,
        configs_folder() / "pretrain" / "cifar100_moco.yaml",
        [f"batch_size={batch_size}", f"precision={precision}", "monitor=null"],
    )
    num = 4096
    pixels = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ArrayImages(
        tuple(Path(str(i)) for i in range(num)), torch.zeros(num, dtype=torch.int64), ("x",), Path(), pixels
    )
    source = ResidentSource(images, DEVICE)
    plan = BatchPlan(num, batch_size, drop_last=True, seed=0)
    torch.manual_seed(0)
    model = recipe.framework.build(BackboneRecipe(arch="resnet18", stem="cifar")).to(DEVICE)
    model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(recipe.optimizer, model, batch_size)

    def bare(batch: Batch) -> float:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for part in batch_parts(model, recipe, batch, batch.step):
            with autocast(DEVICE, precision):
                loss = part()["loss"]
            loss.backward()
        optimizer.step()
        model.after_step(0.5)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    bare_seconds: list[float] = []
    loop_seconds: list[float] = []
    waits: list[float] = []

    def load(first: int) -> Iterator[Batch]:
        return source.training(plan, recipe.views, first, steps)

    def in_turn(first: int) -> Iterator[Batch]:
        """Before each of the loop's steps, a bare one; the loop's is all that happens until it asks for the next batch."""
        *most, last = load(first)
        for batch in most:
            bare_seconds.append(bare(batch))
            handed = time.perf_counter()
            yield batch
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            loop_seconds.append(time.perf_counter() - handed)
        yield last  # after it the loop asks for nothing

    def loop(batches: Callable[[int], Iterator[Batch]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(
                title="loop",
                run=RunDirectory(Path(folder)),
                fingerprint="bench",
                data={},
                model=model,
                optimizer=optimizer,
                schedule=lambda step: 1.0,
                num_steps=steps,
                images_per_step=batch_size,
                device=DEVICE,
                seed=0,
                precision=precision,
                after_step=lambda step: model.after_step(0.5),
            )

            def losses(batch: Batch, step: int) -> list[Part]:
                return batch_parts(model, recipe, batch, step, diagnosed=(step + 1) % job.log_every == 0)

            train(job, batches, losses)
            waits.append(json.loads(job.run.log_file.read_text().splitlines()[-1])["data_wait_share"])

    loop(load)  # a warm-up
    waits.clear()
    for _ in range(given.repeats):
        loop(load)
    resident = [*waits]
    loop(in_turn)  # a warm-up
    for list_ in (bare_seconds, loop_seconds):
        list_.clear()
    for _ in range(given.repeats):
        loop(in_turn)
    ratios = [a / b for a, b in zip(loop_seconds, bare_seconds, strict=True)]
    answers = [
        {
            "question": "a step of the loop over a bare step on the same batch, in turn",
            "batch": batch_size,
            "precision": precision,
            "steps": len(ratios),
            "loop_seconds": statistics.median(loop_seconds),
            "bare_seconds": statistics.median(bare_seconds),
            "loop_over_bare_mean": sum(loop_seconds) / sum(bare_seconds),
            "loop_over_bare_median": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios)[::2],
        },
        {"question": "share of a step that the resident loader takes", "data_wait_share": resident},
        {"question": "seconds of `mixmask --help`", **interleaved({"help": show_help}, given.repeats, "help")["help"]},
    ]
    report("loop", f"python -m benchmarks.loop --steps {steps}", answers, given.out)


if __name__ == "__main__":
    main()
