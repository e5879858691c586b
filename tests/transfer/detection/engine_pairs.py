"""The same detector in both engines; importing this skips a test module where Detectron2 cannot be imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("detectron2", reason="Detectron2 cannot be imported")

from detectron2.modeling import build_model

from mixmask.engine.backbones import load_backbone
from mixmask.engine.storage import RunDirectory
from mixmask.transfer.detection.data.annotations import DetectionSet, open_detection
from mixmask.transfer.detection.detector import Detector
from mixmask.transfer.detection.engines import detectron2 as detectron2_engine
from mixmask.transfer.detection.engines.detectron2_config import make_config
from mixmask.transfer.detection.engines.setting import DetectionSetting
from mixmask.transfer.detection.layers.two_stage import TwoStageDetector
from mixmask.transfer.detection.recipe import DetectRecipe
from tests.transfer.detection.test_detection import recipe_of

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
