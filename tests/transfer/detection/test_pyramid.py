"""Detectors on a pyramid: runs on both engines, trunks of timm, and what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from mixmask.engine.backbones import BackboneRecipe, build_trunk, load_backbone
from mixmask.engine.errors import ConfigError
from mixmask.engine.randomness import generator
from mixmask.transfer import stage
from mixmask.transfer.checkpoints.names import COUNTER, to_detectron2
from mixmask.transfer.detection.detector import Targets
from mixmask.transfer.detection.layers.pyramid import TrunkMaps, pool_from_levels, trunk_maps
from mixmask.transfer.detection.recipe import DetectRecipe
from tests.transfer.detection.small_recipes import (
    COCO,
    PYRAMID,
    RETINANET,
    VOC,
    plan,
    recipe_of,
    with_detector,
    with_pyramid,
)
from tests.transfer.detection.test_engines import ENGINES, timm_backbone

DETECTORS = {"fpn": PYRAMID, "retinanet": RETINANET}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("detector", "kind"), [("fpn", "coco"), ("fpn", "voc"), ("retinanet", "coco")])
def test_a_run_keeps_what_it_found_and_learnt(
    engine: str, detector: str, kind: str, voc: Path, coco: Path, tmp_path: Path, resnet18: Path
) -> None:
    text, root = (VOC, voc) if kind == "voc" else (COCO, coco)
    text = with_detector(text, DETECTORS[detector])
    ready = plan(text, root, tmp_path, resnet18, f"engine={engine}", "save_detector=true", "iterations=3")
    record = stage.run(ready)
    masks = detector == "fpn" and kind == "coco"
    assert record.protocol == f"detect_{kind}_{detector}"
    assert set(record.headlines) == {
        f"{k}/{n}" for k in (["bbox", "segm"] if masks else ["bbox"]) for n in ("AP", "AP50", "AP75")
    }
    assert ("segm/AP" in record.metrics) == masks
    assert 0 <= record.metrics["bbox/AP"] <= record.metrics["bbox/AP50"] <= 100
    lines = [json.loads(line) for line in ready.run.log_file.read_text().splitlines()]
    assert isinstance(ready.recipe, DetectRecipe)
    losses = {*ready.recipe.detector.losses.values()} - (set() if masks else {"roi_mask"})
    assert {"step", "loss", *losses} <= lines[-1].keys()
    saved = torch.load(ready.run.path / "detector.pth", weights_only=True)["model"]
    state, _ = load_backbone(resnet18)
    for name in state:
        if not name.endswith(COUNTER):
            assert f"backbone.bottom_up.{to_detectron2(name)}" in saved


@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_every_trunk_tensor_lands_in_the_detector(detector: str, voc: Path, tmp_path: Path, resnet50: Path) -> None:
    state, info = load_backbone(resnet50)
    recipe = recipe_of(with_detector(VOC, detector), voc, tmp_path).detector
    inside = recipe.to_detectron2(recipe.build(info.recipe, state, 10, masks=False).state_dict())
    for name, tensor in state.items():
        assert torch.equal(inside[recipe.place_in_detectron2(to_detectron2(name))], tensor)


@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_pictures_without_boxes_leave_every_parameter_a_gradient(
    detector: str, voc: Path, coco: Path, tmp_path: Path, resnet18: Path
) -> None:
    recipe = recipe_of(with_detector(COCO, detector), coco, tmp_path)
    state, info = load_backbone(resnet18)
    model = recipe.detector.build(info.recipe, state, 3, masks=recipe.masks).train()
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [])
    images = [torch.randint(0, 256, (3, 64, 90), dtype=torch.uint8) for _ in range(2)]
    losses = model.losses(images, [none, none], [generator(0, 1), generator(0, 2)])
    torch.stack([*losses.values()]).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["timm/convnext_atto", "timm/regnetx_002", "timm/resnet18d", "timm/mobilenetv3_small_050"]
)
def test_networks_of_timm_are_measured_too(arch: str, voc: Path, tmp_path: Path) -> None:
    record = stage.run(plan(with_pyramid(VOC), voc, tmp_path, timm_backbone(tmp_path / "b.safetensors", arch)))
    assert record.arch == arch
    with pytest.raises(ConfigError, match="save_detector"):
        plan(with_pyramid(VOC), voc, tmp_path, tmp_path / "b.safetensors", "save_detector=true")


def test_the_maps_of_a_timm_trunk_are_its_own_and_all_are_trained() -> None:
    recipe = BackboneRecipe(arch="timm/convnext_atto")
    trunk: Any = build_trunk(recipe)
    images = torch.randn(2, 3, 64, 96)
    maps: TrunkMaps = trunk_maps(recipe, trunk.state_dict())
    found = maps.eval()(images)
    wanted = trunk.eval().forward_intermediates(images, intermediates_only=True)
    assert [tuple(one.shape) for one in found] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(maps.channels, (4, 8, 16, 32))
    ]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    torch.stack([one.sum() for one in found]).sum().backward()
    assert [name for name, parameter in maps.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("arch", "stem", "problem"),
    [
        ("resnet18", "cifar", "needs a trunk with the standard stem"),
        ("timm/convmixer_768_32", "standard", "maps of strides 4, 8, 16 and 32"),
    ],
)
@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_trunks_without_the_strides_are_refused(
    detector: str, arch: str, stem: str, problem: str, voc: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(with_detector(VOC, detector), voc, tmp_path).detector
    backbone = BackboneRecipe.model_validate({"arch": arch, "stem": stem})
    with pytest.raises(ConfigError, match=problem):
        recipe.check_backbone(backbone)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("detector.rpn.anchor_sizes=[8, 16]", "one size for each of its 5 maps; 2 are given"),
        ("detector.roi.mask_pooler_resolution=1", "greater than or equal to 2"),
        ("detector.box_head.num_fc=0", "greater than or equal to 1"),
    ],
)
def test_values_that_make_no_sense_are_refused(override: str, problem: str, voc: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        recipe_of(with_pyramid(VOC), voc, tmp_path, override)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(4, 400), min_size=1, max_size=6), st.integers(0, 99))
def test_a_box_is_pooled_from_the_map_of_its_size(sides: list[float], seed: int) -> None:
    """FPN, equation 1: from 2^(4 + log2(side / 224)), at least stride 4 and at most 32."""
    torch.manual_seed(seed)
    maps = [torch.randn(1, 2, 512 // stride, 512 // stride) for stride in (4, 8, 16, 32)]
    boxes = torch.stack([torch.tensor([10.0, 20.0, 10 + side, 20 + side]) for side in sides])
    pooled = pool_from_levels(maps, [boxes], 3)
    for box, side, found in zip(boxes, sides, pooled, strict=True):
        level = 0 if side < 112 else 1 if side < 224 else 2 if side < 448 else 3
        stride = 4 * 2**level
        rois = torch.cat([torch.zeros(1, 1), box[None]], dim=1)
        assert torch.equal(found, roi_align(maps[level], rois, 3, 1 / stride, sampling_ratio=0, aligned=True)[0])
