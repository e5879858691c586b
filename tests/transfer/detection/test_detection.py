from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask.engine.backbones import load_backbone
from mixmask.engine.errors import CheckpointError, ConfigError
from mixmask.engine.predictions import MATCHES, SHEET, DetectionMatches
from mixmask.engine.randomness import generator
from mixmask.evaluate.average_precision import AveragePrecision
from mixmask.transfer import stage
from mixmask.transfer.detection.data.annotations import open_detection
from mixmask.transfer.detection.data.batches import evaluation_batches, read_rgb, shortest_edge, training_batches
from mixmask.transfer.detection.engines.precise_bn import estimate_statistics
from mixmask.transfer.detection.engines.torchvision import build_optimizer
from mixmask.transfer.detection.layers.rpn import Targets
from tests.conftest import make_backbone
from tests.transfer.detection.small_recipes import (
    COCO,
    VOC,
    plan,
    recipe_of,
)


def test_every_trunk_tensor_lands_in_the_detector(voc: Path, tmp_path: Path, resnet50: Path) -> None:
    state, info = load_backbone(resnet50)
    detector = recipe_of(VOC, voc, tmp_path).detector.build(info.recipe, state, 10, masks=False)
    back = detector.trunk_state()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    without_source = {n for n in detector.state_dict() if "norm" in n}
    assert without_source == {
        f"roi_heads.norm.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.slow
@pytest.mark.parametrize(("text", "kind"), [(VOC, "voc"), (COCO, "coco")])
def test_both_protocols_run_end_to_end(
    text: str, kind: str, voc: Path, coco: Path, tmp_path: Path, resnet18: Path
) -> None:
    ready = plan(text, voc if kind == "voc" else coco, tmp_path, resnet18)
    record = stage.run(ready)
    assert record.protocol == f"detect_{kind}"
    assert record.settings["engine"] == "torchvision"
    assert 0 <= record.metrics["bbox/AP"] <= record.metrics["bbox/AP50"] <= 100
    assert ("segm/AP" in record.metrics) == (kind == "coco")
    line = json.loads(ready.run.log_file.read_text().splitlines()[-1])
    assert ("roi_mask" in line) == (kind == "coco")
    assert {"rpn_objectness", "rpn_box", "roi_class", "roi_box"} <= line.keys()
    measured = ("bbox", "segm") if kind == "coco" else ("bbox",)
    assert [name for name, file in MATCHES.items() if (ready.run.path / file).exists()] == list(measured)
    for name, file in MATCHES.items():
        if name in measured:
            matches = DetectionMatches.read(ready.run.path / file)
            again = AveragePrecision(matches)(np.ones(len(matches.objects)))
            assert again == pytest.approx(record.metrics[f"{name}/AP"], abs=1e-9)
            assert matches.images == record.data["test"]
    with Image.open(ready.run.path / SHEET) as sheet:
        assert sheet.width > 500


@pytest.mark.slow
def test_training_learns_a_picture_by_heart(voc: Path, tmp_path: Path, resnet18: Path) -> None:
    recipe = recipe_of(VOC, voc, tmp_path, "batch_size=2", "lr=0.01")
    train, _ = open_detection(recipe)
    state, info = load_backbone(resnet18)
    torch.manual_seed(0)
    detector = recipe.detector.build(info.recipe, state, len(train.classes), masks=recipe.masks).train()
    batch = next(training_batches(train, recipe, 0, 0, 1))
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for step in range(25):
        loss = torch.stack(
            [*detector.losses(batch.images, batch.targets, [generator(0, step, row) for row in range(2)]).values()]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])


def test_batches_do_not_depend_on_where_the_run_starts(coco: Path, tmp_path: Path) -> None:
    recipe = recipe_of(COCO, coco, tmp_path)
    train, _ = open_detection(recipe)
    whole, late = list(training_batches(train, recipe, 3, 0, 5)), list(training_batches(train, recipe, 3, 3, 5))
    for a, b in zip(whole[3:], late, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images))
        assert all(torch.equal(x.boxes, y.boxes) and x.polygons == y.polygons for x, y in zip(a.targets, b.targets))
    for batch in whole:
        assert len({image.shape[2] > image.shape[1] for image in batch.images}) == 1


def test_boxes_and_polygons_move_with_the_picture(coco: Path, tmp_path: Path) -> None:
    recipe = recipe_of(COCO, coco, tmp_path)
    train, _ = open_detection(recipe)
    for batch in training_batches(train, recipe, 0, 0, 6):
        for image, target in zip(batch.images, batch.targets):
            for box, polygons in zip(target.boxes.tolist(), target.polygons):
                points = np.concatenate([np.reshape(p, (-1, 2)) for p in polygons])
                assert points.min(0) == pytest.approx(box[:2], abs=0.1)
                assert points.max(0) == pytest.approx(box[2:], abs=0.1)
                assert 0 <= box[0] < box[2] <= image.shape[2]


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((500, 375), 800, 1333, (1067, 800)),
        ((375, 500), 800, 1333, (800, 1067)),
        ((1000, 300), 800, 1333, (1333, 400)),
        ((100, 100), 480, 1333, (480, 480)),
    ],
)
def test_shortest_edge(size: tuple[int, int], short: int, longest: int, expected: tuple[int, int]) -> None:
    assert shortest_edge(*size, short, longest) == expected


def test_pictures_are_read_upright_and_in_rgb(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_rgb(tmp_path / "turned.jpg").size == (10, 20)
    Image.new("CMYK", (20, 10)).save(tmp_path / "cmyk.jpg")
    assert read_rgb(tmp_path / "cmyk.jpg").mode == "RGB"


def test_test_images_keep_their_own_size(voc: Path, tmp_path: Path) -> None:
    recipe = recipe_of(VOC, voc, tmp_path)
    _, test = open_detection(recipe)
    for ((image, index, size),) in evaluation_batches(test, recipe):
        assert size == (test.pictures[index].width, test.pictures[index].height)
        assert min(image.shape[1:]) == 64


def test_crowds_and_empty_pictures_are_not_trained_on(coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco, tmp_path / "mine")
    file = tmp_path / "mine" / "annotations" / "instances_train2017.json"
    document = json.loads(file.read_text())
    for annotation in document["annotations"]:
        if annotation["image_id"] == 1:
            annotation["iscrowd"] = 1
            annotation["segmentation"] = {"size": [96, 72], "counts": [0, 6912]}
    file.write_text(json.dumps(document))
    train, _ = open_detection(recipe_of(COCO, tmp_path / "mine", tmp_path))
    assert len(train) == 11
    assert all(picture.key != "1" for picture in train.pictures)


def test_objects_without_polygons_are_not_trained_on_with_masks(coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco, tmp_path / "mine")
    file = tmp_path / "mine" / "annotations" / "instances_train2017.json"
    document = json.loads(file.read_text())
    for number, annotation in enumerate(document["annotations"]):
        if annotation["image_id"] == 1:
            annotation["segmentation"] = [[], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]]][number % 3]
    file.write_text(json.dumps(document))
    train, _ = open_detection(recipe_of(COCO, tmp_path / "mine", tmp_path))
    assert len(train) == 11
    assert all(i.polygons for picture in train.pictures for i in picture.instances)


@pytest.mark.parametrize(
    "override",
    [
        "min_size_train=[0]",
        "rpn.anchor_sizes=[]",
        "rpn.aspect_ratios=[0]",
        "rpn.iou_negative=0.9",
        "milestones=[-5]",
        "name=2020-13-45",
        "rpn={[1]: 2}",
    ],
)
def test_values_that_make_no_sense_are_refused(override: str, voc: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        recipe_of(VOC, voc, tmp_path, override)


def test_other_stems_and_damaged_backbones_are_refused(voc: Path, tmp_path: Path, resnet18: Path) -> None:
    cifar = make_backbone(tmp_path / "cifar.safetensors", stem="cifar")
    with pytest.raises(ConfigError, match="standard stem"):
        plan(VOC, voc, tmp_path, cifar)
    (tmp_path / "half.safetensors").write_bytes(resnet18.read_bytes()[:9999])
    with pytest.raises(CheckpointError, match="truncated"):
        plan(VOC, voc, tmp_path, tmp_path / "half.safetensors")
    assert not (tmp_path / "runs").exists()


def test_scaling_to_another_batch_size(voc: Path, tmp_path: Path) -> None:
    recipe = recipe_of(VOC, voc, tmp_path, "reference_batch_size=16", "batch_size=4", "lr=0.02", "iterations=24000")
    assert recipe.scaled_lr == pytest.approx(0.005)
    assert recipe.scaled_length(recipe.iterations) == 96000
    assert recipe.scaled_length(0) == 0


def test_statistics_are_those_of_all_positions(resnet18: Path) -> None:
    """Against all positions of all batches at once, for batches of different sizes."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4))
    unused = torch.nn.BatchNorm2d(2)
    network.add_module("unused", unused)
    batches = [torch.randn(num, 3, side, side) * scale for num, side, scale in ((2, 3, 1.0), (5, 7, 3.0), (1, 2, 0.5))]
    momenta = [m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    network.train()
    used = network[:3]
    assert estimate_statistics(network, batches, used) == 3
    seen = torch.cat([network[0](batch).permute(0, 2, 3, 1).reshape(-1, 4) for batch in batches]).double()
    torch.testing.assert_close(network[1].running_mean.double(), seen.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network[1].running_var.double(), seen.var(0, correction=0), rtol=1e-4, atol=1e-5)
    assert torch.equal(unused.running_var, torch.ones(2))
    assert [m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)] == momenta


def test_normalisation_has_no_weight_decay_synchronised_or_not(voc: Path, tmp_path: Path, resnet18: Path) -> None:
    recipe = recipe_of(VOC, voc, tmp_path)
    state, info = load_backbone(resnet18)
    detector = recipe.detector.build(info.recipe, state, 3, masks=recipe.masks)
    for model in (detector, torch.nn.SyncBatchNorm.convert_sync_batchnorm(detector)):
        rest, norms = build_optimizer(model, recipe).param_groups
        assert (rest["weight_decay"], norms["weight_decay"]) == (recipe.weight_decay, 0.0)
        assert len(norms["params"]) == 2 * 21
        assert all(p.ndim == 1 for p in norms["params"])


def test_pictures_without_boxes_leave_every_parameter_a_gradient(voc: Path, tmp_path: Path, resnet18: Path) -> None:
    """Several processes wait for each other's gradients; one whose boxes all vanished must have some, too."""
    recipe = recipe_of(VOC, voc, tmp_path)
    state, info = load_backbone(resnet18)
    detector = recipe.detector.build(info.recipe, state, 3, masks=recipe.masks).train()
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [])
    images = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8) for _ in range(2)]
    losses = detector.losses(images, [none, none], [generator(0, 1), generator(0, 2)])
    torch.stack([*losses.values()]).sum().backward()
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []
    assert float(losses["rpn_box"]) == float(losses["roi_box"]) == 0


def test_warm_up_is_no_longer_than_the_run(voc: Path, tmp_path: Path) -> None:
    keys = ["iterations=300", "warmup_iterations=1000"]
    assert recipe_of(VOC, voc, tmp_path, *keys).warmup_in_force == 300
    assert recipe_of(VOC, voc, tmp_path, *keys, "milestones=[200,280]").warmup_in_force == 200
    assert recipe_of(VOC, voc, tmp_path, "iterations=300", "warmup_iterations=100").warmup_in_force == 100
