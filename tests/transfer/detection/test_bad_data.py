from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mixmask.engine.errors import DataError
from mixmask.transfer.detection.data.annotations import open_detection
from mixmask.transfer.protocol import TransferRecipe
from tests.transfer.detection.small_recipes import (
    COCO,
    VOC,
    recipe_of,
)


@pytest.fixture
def my_voc(voc: Path, tmp_path: Path) -> Path:
    shutil.copytree(voc, tmp_path / "devkit")
    return tmp_path / "devkit"


def test_voc_trouble_is_found_before_training(my_voc: Path, tmp_path: Path) -> None:
    recipe = recipe_of(VOC, my_voc, tmp_path)
    annotation = my_voc / "VOC2007" / "Annotations" / "000001.xml"
    whole = annotation.read_text()
    with pytest.raises(DataError, match=r"'2012/trainval' of data.train.*Lists there: 2007/test, 2007/trainval"):
        open_detection(recipe_of(VOC, my_voc, tmp_path, "data.train=[2012/trainval]"))
    with pytest.raises(DataError, match=r"000001\.xml: unknown class '.*'; valid: cat"):
        open_detection(recipe_of(VOC, my_voc, tmp_path, "data.classes=[cat]"))
    annotation.write_text(whole.replace("<xmax>", "<xmax>9"))
    with pytest.raises(DataError, match=r"000001\.xml: the box .* lies outside the image"):
        open_detection(recipe)
    annotation.write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"000001\.xml: damaged annotation"):
        open_detection(recipe)
    annotation.unlink()
    with pytest.raises(DataError, match=r"000001\.xml: no such annotation file"):
        open_detection(recipe)
    annotation.write_text(whole)
    picture = my_voc / "VOC2007" / "JPEGImages" / "000002.jpg"
    content = picture.read_bytes()
    picture.write_bytes(content[:500])
    with pytest.raises(DataError, match=r"000002\.jpg: not a readable image"):
        open_detection(recipe)
    picture.unlink()
    with pytest.raises(DataError, match=r"000002\.jpg: no such image"):
        open_detection(recipe)


def test_coco_trouble_is_found_before_training(coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco, tmp_path / "mine")
    root = tmp_path / "mine"
    recipe = recipe_of(COCO, root, tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    whole = json.loads(file.read_text())

    def expect(message: str, **changes: object) -> None:
        file.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(DataError, match=message):
            open_detection(recipe)

    expect("not a COCO annotation file", images=3)
    rle = {**whole["annotations"][0], "segmentation": {"size": [96, 72], "counts": [0, 6912]}}
    expect("has a run-length mask and is no crowd", annotations=[rle])
    expect("which is not listed", images=whole["images"][1:])
    expect("has the unknown category", categories=whole["categories"][1:])
    expect("none of the 12 training pictures has an annotated object", annotations=[])
    expect("no such image, though", images=[{**whole["images"][0], "file_name": "gone.jpg"}, *whole["images"][1:]])
    file.write_text(json.dumps(whole)[:1000])
    with pytest.raises(DataError, match="truncated or not JSON"):
        open_detection(recipe)


def test_what_cocos_evaluation_would_stumble_over_is_found_before_training(coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco, tmp_path / "mine")
    recipe = recipe_of(COCO, tmp_path / "mine", tmp_path)
    file = tmp_path / "mine" / "annotations" / "instances_val2017.json"
    whole = json.loads(file.read_text())
    first, *rest = whole["annotations"]

    def expect(message: str, **changes: object) -> None:
        file.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(DataError, match=message):
            open_detection(recipe)

    expect("annotations with the id 0; whole numbers from 1", annotations=[{**first, "id": 0}, *rest])
    expect("several annotations have the id", annotations=[first, first, *rest])
    expect("images with the id 'x'", images=[{**whole["images"][0], "id": "x"}, *whole["images"][1:]])
    for key in ("area", "iscrowd", "segmentation"):
        expect(f"has no {key}", annotations=[{k: v for k, v in first.items() if k != key}, *rest])
    expect("no mask to evaluate", annotations=[{**first, "segmentation": []}, *rest])
    size = next([i["height"], i["width"]] for i in whole["images"] if i["id"] == first["image_id"])
    rle = {"size": size, "counts": [0, size[0] * size[1]]}
    file.write_text(json.dumps({**whole, "annotations": [{**first, "segmentation": rle}, *rest]}))
    open_detection(recipe)


def test_test_pictures_without_objects_are_refused(my_voc: Path, tmp_path: Path) -> None:
    for name in (my_voc / "VOC2007" / "ImageSets" / "Main" / "test.txt").read_text().split():
        annotation = my_voc / "VOC2007" / "Annotations" / f"{name}.xml"
        annotation.write_text(annotation.read_text().replace("<difficult>0", "<difficult>1"))
    with pytest.raises(DataError, match="contain no object that counts"):
        open_detection(recipe_of(VOC, my_voc, tmp_path))


def test_a_name_of_another_year_is_remarked(voc: Path, tmp_path: Path) -> None:
    recipe = recipe_of(VOC, voc, tmp_path, "data.name=voc2012")
    assert isinstance(recipe, TransferRecipe)
    assert recipe.remarks() == [
        "data.name=voc2012 is what tables will call the test pictures, and they are 2007/test: give data.name=voc2007"
    ]
    assert recipe.model_copy(update={"data": recipe.data.model_copy(update={"name": "mine"})}).remarks() == []
