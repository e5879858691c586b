"""The same detector in both engines; importing this skips a test module where Detectron2 cannot be imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("detectron2", reason="Detectron2 cannot be imported")

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from benchmarks.detection import their_batch
from mixmask.engine.backbones import load_backbone
from mixmask.engine.randomness import generator
from mixmask.engine.storage import RunDirectory
from mixmask.transfer.detection.data.annotations import open_detection
from mixmask.transfer.detection.data.batches import DetectionBatch
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.engines import detectron2 as detectron2_engine
from mixmask.transfer.detection.engines.detectron2_config import make_config
from mixmask.transfer.detection.engines.setting import DetectionSetting
from mixmask.transfer.detection.engines.torchvision import in_original_pixels, on_cpu
from mixmask.transfer.detection.layers.two_stage import TwoStageDetector
from mixmask.transfer.detection.network import Detector
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.detection.results.metrics import FoundObject
from tests.transfer.detection.small_recipes import recipe_of

SIZES = [(192, 256), (176, 240)]


@dataclasses.dataclass
class Pair:
    """The same network in both engines, with the same weights."""

    recipe: DetectRecipe
    ours: Any  # a `Detector`, of the recipe's kind
    theirs: Any
    cfg: Any
    train: DetectionSet
    test: DetectionSet


def setting_of(recipe: DetectRecipe, backbone: Path, tmp_path: Path) -> DetectionSetting:
    state, info = load_backbone(backbone)
    train, test = open_detection(recipe)
    return DetectionSetting(
        RunDirectory(tmp_path / "run"),
        "x",
        {},
        torch.device("cpu"),
        "fp32",
        0,
        "test",
        10,
        500,
        info.recipe,
        state,
        train,
        test,
    )


def make_pair(text: str, root: Path, tmp_path: Path, backbone: Path, *overrides: str) -> Pair:
    recipe = recipe_of(text, root, tmp_path, "min_size_train=[128]", *overrides)
    setting = setting_of(recipe, backbone, tmp_path)
    names = [detectron2_engine._register(recipe, setting, split) for split in (*recipe.data.train, *recipe.data.test)]
    cfg = make_config(
        recipe,
        setting.backbone,
        len(setting.train_set.classes),
        device=torch.device("cpu"),
        precision="fp32",
        seed=0,
        weights=Path(),
        output=tmp_path / "d2",
        train=names[:1],
        test=names[1:],
        num_workers=0,
        checkpoint_every=500,
    )
    torch.manual_seed(0)
    ours = recipe.detector.build(setting.backbone, setting.state, len(setting.train_set.classes), recipe.masks)
    spread = {  # so that scores, boxes and masks differ from place to place
        "rpn.objectness.weight": 0.05,
        "rpn.deltas.weight": 0.01,
        "roi_heads.classifier.weight": 0.1,
        "roi_heads.regressor.weight": 0.02,
        "roi_heads.mask_head.predictor.weight": 0.1,
        "roi_heads.keypoint_head.score_lowres.weight": 0.1,
        "head.cls_score.weight": 0.3,
        "head.bbox_pred.weight": 0.1,
    }
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in spread:
                parameter.normal_(std=spread[name])
    calibrate(ours)
    theirs = build_model(cfg)
    found = theirs.load_state_dict(recipe.detector.to_detectron2(ours.state_dict()), strict=False)
    assert not found.unexpected_keys
    assert not found.missing_keys
    return Pair(recipe, ours, theirs, cfg, setting.train_set, setting.test_set)


def calibrate(detector: Detector) -> None:
    """Make random weights behave as trained ones: weak residual branches, and the batch statistics of pictures.

    Without it values and gradients grow from layer to layer, and with them the rounding of fp32.
    """
    for name, parameter in detector.named_parameters():
        if name.endswith("bn3.weight"):
            parameter.data.fill_(0.25)
    layers = [module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0
    detector.train()
    with torch.no_grad():
        if isinstance(detector, TwoStageDetector):
            maps = detector.maps(pictures())
            boxes = [torch.tensor([[8.0, 8, 60, 70], [20, 4, 100, 50], [2, 30, 40, 79]])] * 2
            detector.roi_heads.vectors(maps, boxes)
            if detector.roi_heads.mask_head is not None:
                detector.roi_heads.mask_head(detector.roi_heads.for_masks(maps, boxes))
        else:
            detector.detect(pictures())
    for layer in layers:
        layer.momentum = 0.1


def pictures() -> list[Tensor]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=rng) for size in SIZES]


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal within 1e-4 of the largest value: sums of fp32 products in another order do not agree to the last element."""
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def fix_statistics(pair: Pair, train: bool) -> None:
    """Training mode, but for batch normalisation: statistics of a handful of positions would magnify rounding."""
    for model in (pair.ours, pair.theirs):
        model.train(train)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()


def both_losses(pair: Pair, batch: DetectionBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with EventStorage():
        theirs = {pair.recipe.detector.losses[name]: loss for name, loss in pair.theirs(their_batch(batch)).items()}
    rng = [generator(0, row) for row in range(len(batch.images))]
    return theirs, pair.ours.losses(batch.images, batch.targets, rng)


def detected_by_both(pair: Pair) -> Iterator[tuple[Any, list[FoundObject]]]:
    """For each picture Detectron2's instances and our objects; labels, scores and boxes are found to be the same."""
    images, sizes = pictures(), [(121, 161), (352, 480)]  # the pictures' own, from which they were resized
    pair.ours.eval()
    pair.theirs.eval()
    inputs = [{"image": image, "height": h, "width": w} for image, (h, w) in zip(images, sizes)]
    with torch.no_grad():
        theirs = [output["instances"] for output in pair.theirs(inputs)]
        detections = pair.ours.detect(images)
    for number, (one, other) in enumerate(zip(theirs, detections, strict=True)):
        height, width = sizes[number]
        found = in_original_pixels(on_cpu(other), number, images[number].shape[1:], width, height)
        assert len(found) == len(one) > 2
        assert [f.label for f in found] == one.pred_classes.tolist()
        close(torch.tensor([f.score for f in found]), one.scores)
        torch.testing.assert_close(torch.tensor([f.box for f in found]), one.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
        yield one, found


def require_same_gradients(pair: Pair, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The gradients of the sums of both networks' losses, parameter by parameter."""
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    for losses in (ours, theirs):
        torch.stack([*losses.values()]).sum().backward()
    wanted = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    given = pair.recipe.detector.to_detectron2({name: p.grad for name, p in pair.ours.named_parameters()})
    assert given.keys() == wanted.keys()
    for name, gradient in given.items():
        # Rounding of 1e-6 turns a share of 1e-6 of all ReLUs on or off, and that is 1e-3 of a gradient's norm per layer.
        assert float((gradient - wanted[name]).norm()) < 2e-2 * float(wanted[name].norm()) + 1e-6, name
