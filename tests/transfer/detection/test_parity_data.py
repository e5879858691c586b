"""Both engines read, resize and judge alike: Detectron2 must be importable, or these are skipped with the reason."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2", reason="Detectron2 cannot be imported")

from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import detection_utils as theirs_utils
from detectron2.data import transforms as T
from detectron2.data.transforms import AugmentationList
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from mixmask.engine.randomness import generator
from mixmask.transfer.detection.data.batches import _Training, read_rgb
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.engines import detectron2 as detectron2_engine
from mixmask.transfer.detection.engines.precise_bn import estimate_statistics
from mixmask.transfer.detection.results.metrics import FoundObject, coco_metrics, voc_metrics
from tests.conftest import make_backbone
from tests.transfer.detection.engine_pairs import make_pair
from tests.transfer.detection.keypoint_sets import KEYPOINTS, SIGMAS, persons, random_finds, write_keypoints
from tests.transfer.detection.small_recipes import COCO, VOC

__all__ = ["persons"]


@pytest.mark.parametrize("kind", ["voc", "coco", "persons"])
def test_same_pictures_boxes_polygons_and_keypoints(
    kind: str, voc: Path, coco: Path, persons: Path, tmp_path: Path
) -> None:
    """Their loader's dictionaries, resized and flipped by their own transforms, against ours."""
    texts, roots = {"voc": VOC, "coco": COCO, "persons": KEYPOINTS}, {"voc": voc, "coco": coco, "persons": persons}
    pair = make_pair(
        texts[kind],
        roots[kind],
        tmp_path,
        make_backbone(tmp_path / "b.safetensors"),
    )
    dictionaries = {str(d["image_id"]): d for d in DatasetCatalog.get(pair.cfg.DATASETS.TRAIN[0])}
    assert len(dictionaries) == len(pair.train)
    mapper = DatasetMapper(pair.cfg, is_train=True)
    if pair.train.keypoints is not None:
        assert list(mapper.keypoint_hflip_indices) == pair.train.keypoints.mirrored
    views = _Training(pair.train, pair.recipe, 0)
    seen = set()
    for index, picture in enumerate(pair.train.pictures):
        theirs = dictionaries[picture.key.rpartition("/")[2]]
        assert (theirs["width"], theirs["height"]) == (picture.width, picture.height)
        for step in range(4):
            pixels, target = views[(step, index)]
            flipped = bool(torch.rand((), generator=_after_size(step, index)) < 0.5)
            mapper.augmentations = AugmentationList(
                [T.ResizeShortestEdge([128, 128], pair.recipe.max_size_train), T.RandomFlip(prob=float(flipped))]
            )
            mapped = mapper(theirs)
            seen.add(flipped)
            assert torch.equal(mapped["image"], pixels)
            assert torch.equal(mapped["instances"].gt_classes, target.labels)
            torch.testing.assert_close(mapped["instances"].gt_boxes.tensor, target.boxes, rtol=0, atol=1e-4)
            if target.keypoints is not None:
                torch.testing.assert_close(mapped["instances"].gt_keypoints.tensor, target.keypoints, rtol=0, atol=1e-4)
            if kind == "coco":
                for one, other in zip(mapped["instances"].gt_masks.polygons, target.polygons, strict=True):
                    for a, b in zip(one, other, strict=True):
                        np.testing.assert_allclose(a, b, atol=1e-4)
    assert seen == {True, False}


def _after_size(step: int, index: int) -> torch.Generator:
    rng = generator(0, "detection-view", step, index)
    torch.randint(1, (), generator=rng)
    return rng


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "I;16", "1", "turned"])
def test_same_pixels_from_every_kind_of_image(mode: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    path = tmp_path / "x.png"
    if mode == "turned":
        path = tmp_path / "x.jpg"
        exif = Image.Exif()
        exif[0x0112] = 8
        picture.save(path, exif=exif)
    elif mode == "CMYK":
        path = tmp_path / "x.jpg"
        picture.convert("CMYK").save(path)
    elif mode == "I;16":
        Image.fromarray(values[:, :, 0].astype(np.uint16) * 257).save(path)
    else:
        picture.convert(mode).save(path)
    assert np.array_equal(np.asarray(read_rgb(path)), theirs_utils.read_image(str(path), format="RGB"))


def random_detections(pictures: DetectionSet, seed: int, masks: bool) -> list[FoundObject]:
    """Truth with noise, twice, and boxes anywhere; scores with ties."""
    rng = np.random.default_rng(seed)
    found = []
    for number, picture in enumerate(pictures.pictures):
        for instance in [*picture.instances, *picture.instances]:
            noise = rng.normal(scale=1.5, size=4)
            left, top, right, bottom = np.asarray(instance.box) + noise
            box = (left, top, max(right, left + 1), max(bottom, top + 1))
            label = instance.label if rng.random() < 0.8 else int(rng.integers(len(pictures.classes)))
            found.append((number, label, box))
        for _ in range(5):
            left, top = rng.random(2) * [picture.width / 2, picture.height / 2]
            box = (left, top, left + 5 + 30 * rng.random(), top + 5 + 30 * rng.random())
            found.append((number, int(rng.integers(len(pictures.classes))), box))
    result = []
    for number, label, box in found:
        values = tuple(np.asarray(box, dtype=np.float32).tolist())
        mask = None
        if masks:
            picture = pictures.pictures[number]
            pixels = np.zeros((picture.height, picture.width), dtype=np.uint8, order="F")
            left, top, right, bottom = (int(max(v, 0)) for v in values)
            pixels[top:bottom, left:right] = 1
            mask = coco_mask.encode(pixels)
        result.append(FoundObject(number, label, float(np.float32(rng.integers(50, 1000) / 1000)), values, mask))
    return result


def as_outputs(found: list[FoundObject], pictures: DetectionSet) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for number, picture in enumerate(pictures.pictures):
        own = [d for d in found if d.picture == number]
        instances = Instances((picture.height, picture.width))
        instances.pred_boxes = Boxes(torch.tensor([d.box for d in own]).reshape(-1, 4))
        instances.scores = torch.tensor([d.score for d in own])
        instances.pred_classes = torch.tensor([d.label for d in own])
        if own and own[0].mask is not None:
            instances.pred_masks = torch.from_numpy(np.stack([coco_mask.decode(d.mask) for d in own])).bool()
        if own and own[0].keypoints is not None:
            instances.pred_keypoints = torch.tensor([d.keypoints for d in own])
        identifier = picture.key.rpartition("/")[2]
        yield {"image_id": int(identifier) if "/" not in picture.key else identifier}, {"instances": instances}


def difficult_or_crowd(root: Path, kind: str) -> None:
    if kind == "voc":
        for number, file in enumerate(sorted((root / "VOC2007" / "Annotations").glob("*.xml"))):
            if number % 2:
                file.write_text(file.read_text().replace("<difficult>0", "<difficult>1", 1))
        return
    file = root / "annotations" / "instances_train2017.json"
    document = json.loads(file.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    for annotation in document["annotations"][::3]:
        mask = coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], *sizes[annotation["image_id"]]))
        counts = [0]
        for value in coco_mask.decode(mask).ravel(order="F").tolist():
            if value == len(counts) % 2:
                counts.append(0)
            counts[-1] += 1
        annotation["iscrowd"], annotation["segmentation"] = 1, {"size": list(mask["size"]), "counts": counts}
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_same_average_precision_for_the_same_detections(
    kind: str, seed: int, voc: Path, coco: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(voc if kind == "voc" else coco, root)
    difficult_or_crowd(root, kind)
    text, splits = (VOC, "2007/test 2007/trainval") if kind == "voc" else (COCO, "val2017 train2017")
    small, large = splits.split()
    pair = make_pair(
        text, root, tmp_path, make_backbone(tmp_path / "b.safetensors"), f"data.train=[{small}]", f"data.test=[{large}]"
    )
    marked = [i for picture in pair.test.pictures for i in picture.instances if i.difficult or i.crowd]
    assert marked
    found = random_detections(pair.test, seed, masks=kind == "coco")
    name = pair.cfg.DATASETS.TEST[0]
    DatasetCatalog.get(name)  # which tells its catalogue COCO's category ids
    judge = PascalVOCDetectionEvaluator(name) if kind == "voc" else COCOEvaluator(name, output_dir=None)
    judge.reset()
    for picture, output in as_outputs(found, pair.test):
        judge.process([picture], [output])
    theirs = detectron2_engine.flat_metrics(judge.evaluate())
    ours = voc_metrics(found, pair.test) if kind == "voc" else coco_metrics(found, pair.test, pair.recipe.measures)
    assert theirs["bbox/AP"] > 1
    for metric, value in theirs.items():
        assert ours[metric] == pytest.approx(value, abs=1e-6), metric


def test_same_keypoint_metrics_for_the_same_detections(coco: Path, tmp_path: Path) -> None:
    pair = make_pair(
        KEYPOINTS,
        write_keypoints(coco, tmp_path / "coco", crowd=True),
        tmp_path,
        make_backbone(tmp_path / "b.safetensors"),
    )
    name = pair.cfg.DATASETS.TEST[0]
    DatasetCatalog.get(name)
    judge = COCOEvaluator(name, output_dir=None, kpt_oks_sigmas=SIGMAS)
    judge.reset()
    found = random_finds(pair.test, 1)
    for picture, output in as_outputs(found, pair.test):
        judge.process([picture], [output])
    theirs = detectron2_engine.flat_metrics(judge.evaluate())
    ours = coco_metrics(found, pair.test, pair.recipe.measures)
    assert theirs["keypoints/AP"] > 1
    for metric, value in theirs.items():
        assert ours[metric] == pytest.approx(value, abs=1e-6), metric


def test_same_precise_statistics() -> None:
    from fvcore.nn.precise_bn import update_bn_stats

    torch.manual_seed(0)
    batches = [torch.randn(num, 3, side, side) for num, side in ((2, 5), (4, 3), (3, 8))]
    ours = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.BatchNorm2d(6)
    )
    theirs = copy.deepcopy(ours)
    estimate_statistics(ours, batches, ours)
    update_bn_stats(theirs, batches, len(batches))
    for name, tensor in theirs.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
