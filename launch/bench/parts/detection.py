"""Training iterations of both kinds of Mask R-CNN, and Detectron2's on the same batch where it can be imported."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk
from mixmask.engine.builtin_configs import config_file
from mixmask.engine.precision import Precision, autocast
from mixmask.engine.randomness import generator
from mixmask.launch.bench.machine import Call, Machine
from mixmask.launch.bench.part import LeftOut, Part, Row
from mixmask.launch.demo.demo_data import write_coco
from mixmask.transfer.detection.data.annotations import open_detection
from mixmask.transfer.detection.data.batches import DetectionBatch, training_batches
from mixmask.transfer.detection.engines import torchvision as engine
from mixmask.transfer.detection.engines.detectron2_config import make_config
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.recipe import load_transfer_recipe

CONFIGS = {"C4": "detect_coco", "FPN": "detect_coco_fpn"}
RESNET = BackboneRecipe(arch="resnet50")


class Detection(Part):
    """Seconds of an iteration: forward and backward pass, and optimizer, on drawn pictures."""

    name = "detection"
    title = "Detection: iterations of Mask R-CNN with ResNet-50"
    place = 6
    share = 0.1

    @override
    def measure(self, machine: Machine, before: dict[str, list[Row]]) -> Iterator[Row | LeftOut]:
        batch, short = (16, 800) if machine.is_gpu and machine.memory > 35 * 10**9 else (2, 256)
        missing = _missing()
        if missing is not None:
            yield LeftOut("Detectron2's iterations", missing)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_coco(root, size=(640, 480), train=batch, val=1, seed=0)
            for title, config in CONFIGS.items():
                if machine.left <= 0:
                    yield LeftOut(f"detection with {title}", "the time was up")
                    continue
                overrides = [f"data.root={root}", "backbone=none", f"batch_size={batch}", "data.num_workers=0"]
                if not machine.is_gpu:
                    overrides.append("detector.roi.batch_per_image=64")  # 512 regions take half a minute
                recipe = load_transfer_recipe(
                    config_file(Path(config), "transfer"), [*overrides, f"min_size_train=[{short}]"]
                )
                assert isinstance(recipe, DetectRecipe)
                yield from _rows(machine, title, recipe, short, missing is None)


def _missing() -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("detectron2.engine")
    except Exception as error:  # whatever its import raises is the answer
        return f"it cannot be imported ({error})"
    return None


def _rows(machine: Machine, title: str, recipe: DetectRecipe, short: int, theirs: bool) -> Iterator[Row]:
    pictures, _ = open_detection(recipe)
    torch.manual_seed(0)
    detector = recipe.detector.build(RESNET, build_trunk(RESNET).state_dict(), len(pictures.classes), recipe.masks)
    detector.train()
    batch = next(training_batches(pictures, recipe, 0, 0, 1))
    images, targets = engine.to_device(batch, machine.device)
    optimizer = engine.build_optimizer(detector, recipe)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4

    def ours(precision: Precision) -> Call:
        def step() -> None:
            detector.arrange(machine.device, precision)
            with autocast(machine.device, precision):
                losses = detector.losses(images, targets, [generator(0, row) for row in range(len(images))])
            _finish([*losses.values()], optimizer)

        return step

    found = {f"ours, {precision}": ours(precision) for precision in dict.fromkeys(("fp32", machine.precision))}
    if theirs:
        found["Detectron2, fp32"] = _detectron2(machine, recipe, detector, len(pictures.classes), batch)
    pixels = sum(image[0].numel() for image in images) / len(images)
    seconds = {name: machine.time(call, most=8, seconds=8.0).seconds for name, call in found.items()}
    for name, value in seconds.items():
        other = seconds.get("Detectron2, fp32")
        said = "" if other is None or not name.startswith("ours") else f"{value / other:.2f} × Detectron2's time"
        yield Row(
            f"{title}, {name}, {len(images)} images of {short} pixels", value, "s", limit=said,
            more={"images_per_s": len(images) / value, "pixels_per_image": pixels},
        )  # fmt: skip


def _finish(losses: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(torch.stack(losses).sum())
    optimizer.step()


def _detectron2(machine: Machine, recipe: DetectRecipe, ours: Any, num_classes: int, batch: DetectionBatch) -> Call:
    """Detectron2's own training iteration of the same detector, from the same weights, on the same batch."""
    from detectron2.modeling import build_model
    from detectron2.solver import build_optimizer
    from detectron2.structures import Boxes, Instances, PolygonMasks
    from detectron2.utils.events import EventStorage

    with tempfile.TemporaryDirectory() as folder:
        cfg = make_config(
            recipe, RESNET, num_classes, device=machine.device, precision="fp32", seed=0, weights=Path(),
            output=Path(folder), train=[], test=[], num_workers=0, checkpoint_every=500,
        )  # fmt: skip
    model = build_model(cfg)
    model.load_state_dict(recipe.detector.to_detectron2(ours.state_dict()), strict=False)
    model.train()
    inputs = []
    for image, target in zip(batch.images, batch.targets, strict=True):
        instances = Instances((image.shape[1], image.shape[2]))
        instances.gt_boxes, instances.gt_classes = Boxes(target.boxes), target.labels
        instances.gt_masks = PolygonMasks([[np.asarray(polygon) for polygon in one] for one in target.polygons])
        inputs.append({"image": image, "instances": instances})
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4

    def step() -> None:
        with EventStorage():
            losses = model(inputs)
        _finish([*losses.values()], optimizer)

    return step
