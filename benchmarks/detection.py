"""Seconds of one training iteration of both detection engines: same recipe, weights and batches, on this machine.

    PYTHONPATH=<detectron2's source tree> python -m benchmarks.detection --root DATA [--config detect_coco_fpn] [--short 256]

ResNet-50, batch 2 (16 on a GPU), pictures whose short side is ``--short`` pixels (the recipe's 480 … 800 on a GPU).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import interleaved, parser, report
from mixmask.engine.backbones import BackboneRecipe, build_trunk
from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.precision import autocast, fast_bf16
from mixmask.engine.randomness import generator
from mixmask.transfer.detection.data.annotations import open_detection
from mixmask.transfer.detection.data.batches import DetectionBatch, training_batches
from mixmask.transfer.detection.engines import torchvision as torchvision_engine
from mixmask.transfer.detection.engines.detectron2_config import make_config, require_detectron2
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.recipe import load_transfer_recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def their_batch(batch: DetectionBatch) -> list[dict[str, Any]]:
    from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks

    inputs = []
    for image, target in zip(batch.images, batch.targets, strict=True):
        instances = Instances((image.shape[1], image.shape[2]))
        instances.gt_boxes = Boxes(target.boxes)
        instances.gt_classes = target.labels
        if any(target.polygons):
            instances.gt_masks = PolygonMasks([[np.asarray(p) for p in one] for one in target.polygons])
        if target.keypoints is not None:
            instances.gt_keypoints = Keypoints(target.keypoints)
        inputs.append({"image": image, "instances": instances})
    return inputs


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--root", required=True)
    arguments.add_argument("--config", default="detect_voc", help="a config in configs/transfer, by its name")
    arguments.add_argument("--train", default=None, help="the training split; the recipe's by default")
    arguments.add_argument("--short", type=int, default=None, help="short side in pixels; the recipe's by default")
    arguments.add_argument("--batch", type=int, default=16 if DEVICE.type == "cuda" else 2)
    arguments.add_argument("--arch", default="resnet50")
    arguments.add_argument(
        "overrides", nargs="*", help="keys of the recipe, for example detector.roi.batch_per_image=64"
    )
    given = arguments.parse_args()
    require_detectron2()
    from detectron2.modeling import build_model
    from detectron2.solver import build_optimizer
    from detectron2.utils.events import EventStorage

    overrides = [f"data.root={given.root}", "backbone=none", f"batch_size={given.batch}", "data.num_workers=0"]
    overrides += given.overrides
    if given.train is not None:
        overrides += [f"data.train=[{given.train}]", f"data.test=[{given.train}]", "data.allow_overlap=true"]
    if given.short is not None:
        overrides.append(f"min_size_train=[{given.short}]")
    recipe = load_transfer_recipe(configs_folder() / "transfer" / f"{given.config}.yaml", overrides)
    assert isinstance(recipe, DetectRecipe)
    pictures, _ = open_detection(recipe)
    backbone = BackboneRecipe(arch=given.arch)
    torch.manual_seed(0)
    ours = recipe.detector.build(backbone, build_trunk(backbone).state_dict(), len(pictures.classes), recipe.masks)
    with tempfile.TemporaryDirectory() as folder:
        cfg = make_config(
            recipe,
            backbone,
            len(pictures.classes),
            device=DEVICE,
            precision="fp32",
            seed=0,
            weights=Path(),
            output=Path(folder),
            train=[],
            test=[],
            num_workers=0,
            checkpoint_every=500,
        )
    theirs = build_model(cfg)
    theirs.load_state_dict(recipe.detector.to_detectron2(ours.state_dict()), strict=False)
    ours.train()
    theirs.train()
    batch = next(training_batches(pictures, recipe, 0, 0, 1))
    inputs = their_batch(batch)
    images, targets = torchvision_engine.to_device(batch, DEVICE)
    mine, other = torchvision_engine.build_optimizer(ours, recipe), build_optimizer(cfg, theirs)
    for optimizer in (mine, other):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4

    def finish(losses: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def torchvision(precision: Any) -> None:
        ours.arrange(DEVICE, precision)
        rng = [generator(0, row) for row in range(given.batch)]
        with autocast(DEVICE, precision):
            losses = ours.losses(images, targets, rng)
        finish([*losses.values()], mine)

    def detectron2() -> None:
        with EventStorage():
            losses = theirs(inputs)
        finish([*losses.values()], other)

    calls = {"detectron2": detectron2, "torchvision": lambda: torchvision("fp32")}
    if fast_bf16(DEVICE):
        calls["torchvision_bf16"] = lambda: torchvision("bf16")
    measured = interleaved(calls, given.repeats, "detectron2")
    answer = {
        "question": f"seconds of an iteration of {given.batch} images on {given.config}, and over Detectron2's",
        "sizes": [list(image.shape[1:]) for image in batch.images],
        **measured,
    }
    command = " ".join(
        [
            f"python -m benchmarks.detection --config {given.config} --short {given.short} --batch {given.batch}",
            *given.overrides,
        ]
    )
    report(given.config, command, [answer], given.out)


if __name__ == "__main__":
    main()
