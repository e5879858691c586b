"""What a COCO file may hold, and what is refused before anything is trained on it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mixmask.engine.errors import ConfigError, DataError
from mixmask.transfer.detection.data.annotations import open_detection
from mixmask.transfer.detection.data.coco_checks import _decoded, check_document
from tests.transfer.detection.small_recipes import COCO, VOC, recipe_of

FILE = Path("instances.json")


def document() -> dict[str, Any]:
    return {
        "images": [{"id": 7, "width": 100, "height": 50, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {
                "id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 10.5, 20, 20], "area": 400.0, "iscrowd": 0,
                "segmentation": [[10, 10, 30, 10, 30, 30.5]],
            },
            {
                "id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 5000, "iscrowd": 1,
                "segmentation": {"size": [50, 100], "counts": [0, 5000]},
            },
        ],
    }  # fmt: skip


def test_what_coco_holds_is_no_error() -> None:
    assert check_document(document(), FILE, evaluated=True) is None
    odd = document()
    odd["annotations"][0]["bbox"] = [10, 10, 0, 20]
    odd["annotations"][1]["bbox"] = [-0.5, 0, 101, 10]
    said = check_document(odd, FILE, evaluated=True)
    assert said == (
        "instances.json: boxes of no width or height, which training leaves out: 1; boxes that reach over the border, "
        "which training clips: 1"
    )


NAN, INF = float("nan"), float("inf")


def _set(*way: object) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = way

    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys:
            place = place[key]
        place[last] = value

    return change


def _first(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return _set("annotations", 0, key, value)


def _runs(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return _set("annotations", 1, "segmentation", key, value)


REFUSED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    *[
        (_first("bbox", [value, 1, 2, 3]), "annotation 1: bbox is")
        for value in (NAN, INF, -INF, None, "1", True, 1e300, [1])
    ],
    (_first("bbox", [1, 2, 3]), "annotation 1: bbox is"),
    (_first("bbox", {}), "annotation 1: bbox is"),
    (_first("bbox", [10, 10, -5, 5]), "negative size"),
    (_first("bbox", [10, 10, 500, 5]), "far outside its image of 100×50"),
    (_first("bbox", [-400, 10, 5, 5]), "far outside"),
    *[(_first("segmentation", [[v, 1, 2, 3, 4, 5]]), "not finite or beyond") for v in (NAN, INF, 1e300, -INF, 10**400)],
    *[(_first("segmentation", [[v, 1, 2, 3, 4, 5]]), "lists of x, y") for v in (None, "1", True, [1])],
    (_first("segmentation", [[900, 1, 2, 3, 4, 5]]), "its outline lies far outside"),
    (_first("segmentation", "x"), "polygons or a run-length mask"),
    (_first("area", NAN), "area is nan"),
    (_first("area", "12"), "area is '12'"),
    (_first("area", -1), "area is -1"),
    (_first("iscrowd", 2), "iscrowd is 2"),
    (_first("iscrowd", "0"), "iscrowd is '0'"),
    *[(_first("id", value), "annotations with the id") for value in (1.9, True, 0, -1, "1", None, 1 << 60, [1])],
    (_first("id", 2), "several annotations have the id 2"),
    (_first("image_id", 7.0), "belongs to image 7.0"),
    (_first("category_id", 1.9), "unknown category 1.9"),
    (_first("category_id", [1]), r"unknown category \[1\]"),
    (_runs("counts", [0, 5001]), "covers 5,001 pixels, its image has 5,000"),
    (_runs("counts", [-5000, 10000]), "has the counts"),
    (_runs("counts", [None, 5000]), "has the counts"),
    (_runs("counts", [0.0, 5000]), "has the counts"),
    (_runs("counts", 12), "has the counts 12"),
    (_runs("counts", [1] * 10_000), "covers 10,000 pixels"),
    (_runs("counts", "\x00\x01"), "compressed run-length mask is damaged"),
    (_runs("counts", "o" * 100), "compressed run-length mask is damaged"),
    (_runs("counts", "0" * 100_000), "damaged|covers"),
    (_runs("size", [50, 101]), "has the size"),
    (_runs("size", [50, 100.0]), "has the size"),
    (_set("images", 0, "width", 0), "image 7: width is 0"),
    (_set("images", 0, "height", 1.5), "height is 1.5"),
    (_set("images", 0, "width", 10**30), "a very large number"),
    (_set("images", 0, "file_name", "../../etc/passwd"), "leads out of the folder"),
    (_set("images", 0, "file_name", "/etc/passwd"), "leads out of the folder"),
    (_set("images", 0, "file_name", None), "file_name is None"),
    (_set("images", 0, "id", 7.5), "images with the id 7.5"),
    (_set("categories", 1, "name", "cat"), "several categories are called 'cat'"),
    (_set("categories", 1, "name", 3), "name is 3"),
    (_set("categories", 1, "id", 1), "several categories have the id 1"),
    (_set("annotations", 3), "no list 'annotations'"),
    (_set("images", [1]), "images with 1"),
    (_set("annotations", 0, None), "annotations with None"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_not_of_its_type_or_range_is_refused(number: int) -> None:
    change, said = REFUSED[number]
    content = document()
    change(content)
    with pytest.raises(DataError, match=rf"^instances\.json: .*{said}"):
        check_document(content, FILE, evaluated=False)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.data(), VALUES)
def test_any_value_anywhere_is_read_or_refused(data: st.DataObject, value: object) -> None:
    content = copy.deepcopy(document())
    place: Any = content
    while True:
        key = data.draw(st.sampled_from(sorted(place, key=str) if isinstance(place, dict) else list(range(len(place)))))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = value
    try:
        check_document(content, FILE, evaluated=True)
    except DataError as error:
        said = str(error)
    else:
        return
    assert said.startswith("instances.json: ")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_compressed_runs_are_those_of_pycocotools(height: int, width: int, seed: int) -> None:
    mask = np.asfortranarray(np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8))
    flat = mask.flatten(order="F")
    changes = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
    runs = np.diff(changes).tolist()
    expected = [0, *runs] if flat[0] else runs
    assert _decoded(coco_mask.encode(mask)["counts"].decode(), "x", height * width) == expected


def test_a_file_that_is_no_document(coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco, tmp_path / "mine")
    file = tmp_path / "mine" / "annotations" / "instances_train2017.json"
    recipe = recipe_of(COCO, tmp_path / "mine", tmp_path)
    for content, said in (
        ("[" * 100_000, "nested too deeply"),
        ("[]", "a JSON list instead of an object"),
        ("\udcff", "not valid UTF-8"),
        ('{"a": ' + "1" * 5000 + "}", "truncated or not JSON"),
    ):
        file.write_text(content, errors="surrogateescape")
        with pytest.raises(DataError, match=said):
            open_detection(recipe)


@pytest.mark.parametrize("text", [VOC, COCO])
def test_testing_on_what_was_trained_on(text: str, voc: Path, coco: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(voc if text == VOC else coco, root)
    train = "2007/trainval" if text == VOC else "train2017"
    with pytest.raises(ConfigError, match=f"train and test both list '{train}'"):
        recipe_of(text, root, tmp_path, f"data.test=[{train}]")
    with pytest.raises(ConfigError, match=f"train lists '{train}' twice"):
        recipe_of(text, root, tmp_path, f"data.train=[{train}, {train}]")
    with pytest.raises(ConfigError, match="classes lists 'cat' twice"):
        recipe_of(text, root, tmp_path, "data.classes=[cat, dog, cat]")
    if text == VOC:
        listing = root / "VOC2007" / "ImageSets" / "Main"
        (listing / "again.txt").symlink_to(listing / "trainval.txt")
        again = "2007/again"
    else:
        (root / "again").symlink_to(root / train)
        (root / "annotations" / "instances_again.json").symlink_to(root / "annotations" / f"instances_{train}.json")
        again = "again"
    with pytest.raises(DataError, match=r"is both a training and a test picture, .* data\.allow_overlap=true"):
        open_detection(recipe_of(text, root, tmp_path, f"data.test=[{again}]"))
    with pytest.raises(DataError, match="is listed twice in"):
        open_detection(recipe_of(text, root, tmp_path, f"data.train=[{train}, {again}]"))
    both = recipe_of(text, root, tmp_path, f"data.test=[{again}]", "data.allow_overlap=true")
    assert len(open_detection(both)[1]) > 0


def test_voc_files_in_unknown_codings_are_named(voc: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(voc, root)
    annotation = root / "VOC2007" / "Annotations" / "000001.xml"
    whole = annotation.read_text()
    for head in ('<?xml version="1.0" encoding="x-none"?>', '<?xml version="1.0" encoding="utf-32"?>'):
        annotation.write_text(head + whole)
        with pytest.raises(DataError, match=r"000001\.xml: damaged annotation"):
            open_detection(recipe_of(VOC, root, tmp_path))
    annotation.write_text(whole)
    listing = root / "VOC2007" / "ImageSets" / "Main" / "trainval.txt"
    listing.write_bytes(b"\xff\xfe" + listing.read_bytes())
    with pytest.raises(DataError, match=r"trainval\.txt, line 1: the byte 0xff is not valid UTF-8"):
        open_detection(recipe_of(VOC, root, tmp_path))
