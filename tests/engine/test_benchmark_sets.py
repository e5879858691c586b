"""Readers of public data sets, each on a tiny set in the layout in which its archive unpacks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mixmask
from mixmask.engine.data import KINDS, kind_of, open_split
from mixmask.engine.datasets import DataRecipe, Part, require_same_classes
from mixmask.engine.errors import ConfigError, DataError, UserError
from mixmask.engine.images import Images
from mixmask.launch.commands.app import app
from tests.engine import benchmark_data

# kind: training images per class, test images per class, classes, held out by the official validation split
SETS = {
    "food101": (3, 3, ("apple_pie", "waffles"), None),
    "sun397": (3, 3, ("a/abbey", "c/cabin/indoor"), None),
    "stanford_cars": (3, 3, ("Audi TT", "BMW M3"), None),
    "fgvc_aircraft": (4, 2, ("707-320", "Cessna 172"), 4),
    "dtd": (4, 2, ("banded", "zigzagged"), 4),
    "oxford_pets": (3, 3, ("Abyssinian", "great_pyrenees"), None),
    "flowers102": (4, 2, ("001", "002"), 4),
    "cub200": (2, 2, ("001.Black_footed_Albatross", "002.Laysan_Albatross"), None),
    "places365": (3, 2, ("a/airfield", "b/bow_window/indoor"), None),
    "places205": (3, 3, ("a/abbey", "b/basilica"), None),
    "inaturalist2018": (2, 2, ("00000", "00001"), None),
}


def recipe(root: Path, **keys: object) -> DataRecipe:
    return DataRecipe.model_validate({"name": "data", "root": str(root), **keys})


@pytest.mark.parametrize("kind", SETS)
def test_each_reader(kind: str, tmp_path: Path) -> None:
    getattr(benchmark_data, kind)(tmp_path)
    train_per_class, test_per_class, classes, held = SETS[kind]
    data = recipe(tmp_path)
    assert kind_of(tmp_path, data).kind == kind
    train, test = open_split(data, "train"), open_split(data, "test")
    require_same_classes(train, test)
    assert train.classes == classes
    for images, count in ((train, train_per_class), (test, test_per_class)):
        images.check()
        assert Counter(images.labels.tolist()) == {0: count, 1: count}
        assert images.read(0).shape[0] == 3
    if kind == "stanford_cars":  # the second class of the file is the first one by name
        assert train.labels.tolist() == [1, 0] * 3
    if held is None:
        assert train.validation is None
    else:
        assert int(train.validation.sum()) == held
        assert test.validation is None
    done = CliRunner().invoke(app, ["check-data", str(tmp_path), "--quick"])
    assert done.exit_code == 0, done.output
    assert done.output.count(f"kind      {kind}") == 2
    with pytest.raises(DataError, match=r"has a test split; leave data\.holdout out"):
        open_split(recipe(tmp_path, holdout=0.5), "train")


def outcome(root: Path, kind: str, part: Part) -> str | None:
    """What opening says to the user; None if it works."""
    try:
        open_split(recipe(root, layout=kind), part)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", SETS)
def test_a_missing_list_is_named(kind: str, tmp_path: Path) -> None:
    """Whichever file besides the sign is removed: an error that names it, and never a traceback."""
    getattr(benchmark_data, kind)(tmp_path)
    lists = [
        path
        for path in sorted(tmp_path.rglob("*"))
        if path.is_file() and path.suffix in (".txt", ".json", ".mat", ".csv")
    ]
    for path in lists:
        content = path.read_bytes()
        for damage in (None, b"\x00\xff not what was expected"):
            path.unlink(missing_ok=True)
            if damage is not None:
                path.write_bytes(damage)
            for part in ("train", "test"):
                said = outcome(tmp_path, kind, part)
                assert said is None or str(tmp_path) in said
        path.write_bytes(content)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"as its archives unpack: .* was expected there"):
        open_split(recipe(tmp_path / "empty", layout=kind), "train")


def test_voc_2007_has_several_labels(tmp_path: Path) -> None:
    benchmark_data.write_voc2007(tmp_path, num=12)
    train, test = (open_split(recipe(tmp_path), part) for part in ("train", "test"))
    assert train.classes == ("aeroplane", "bicycle", "cat")
    assert train.labels.shape == (12, 3)
    assert train.labels.tolist()[:2] == [[1, 0, 0], [0, 1, 0]]
    assert {*train.labels.flatten().tolist()} == {-1, 0, 1}
    assert train.validation.tolist() == [False, True] * 6
    assert train.subset([1, 3]).validation.tolist() == [True, True]
    assert test.summary()["listing"] != train.summary()["listing"]
    file = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "cat_test.txt"
    file.write_text(file.read_text().replace(" 1", " 7", 1))
    with pytest.raises(DataError, match=r"cat_test\.txt: image 0000.. has .*; valid: 1, -1, 0"):
        open_split(recipe(tmp_path), "test")


def test_caltech_101_keeps_thirty_of_every_class_for_training(tmp_path: Path) -> None:
    benchmark_data.caltech101(tmp_path)
    train, test = (open_split(recipe(tmp_path), part) for part in ("train", "test"))
    assert train.classes == ("accordion", "yin_yang")
    assert Counter(train.labels.tolist()) == {0: 30, 1: 30}
    assert Counter(test.labels.tolist()) == {0: 3, 1: 2}
    require_same_classes(train, test)
    other = open_split(recipe(tmp_path, holdout_seed=1), "train")
    assert {*other.paths} != {*train.paths}
    for path in sorted((tmp_path / "caltech101" / "101_ObjectCategories" / "yin_yang").iterdir())[30:]:
        path.unlink()
    with pytest.raises(DataError, match="yin_yang: 30 images; 30 are for training, and none is left"):
        open_split(recipe(tmp_path), "train")


def test_eurosat_has_no_split(tmp_path: Path) -> None:
    benchmark_data.eurosat(tmp_path)
    with pytest.raises(DataError, match=r"EuroSAT has no test split: data\.holdout=0\.2"):
        open_split(recipe(tmp_path), "test")
    train, test = (open_split(recipe(tmp_path, holdout=0.2), part) for part in ("train", "test"))
    assert (len(train), len(test)) == (8, 2)


def test_a_list_of_classes(tmp_path: Path, shapes: Path) -> None:
    """ImageNet-100: the folders of ImageNet and a file with a hundred of their names."""
    whole = open_split(recipe(shapes), "train")
    names = [whole.classes[7], whole.classes[2]]
    (tmp_path / "classes.txt").write_text(f"{names[0]} first\n\n{names[1]}\n")
    some = open_split(recipe(shapes, class_list=str(tmp_path / "classes.txt")), "train")
    assert isinstance(some, Images)
    assert some.classes == tuple(sorted(names))
    assert [path.parent.name for path in some.paths] == [some.classes[label] for label in some.labels.tolist()]
    assert len(some) == 24
    for text, said in (("nothing\n", "1 of its classes is not in .*: nothing; there are "), ("\n", "empty")):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(DataError, match=said):
            open_split(recipe(shapes, class_list=str(tmp_path / "classes.txt")), "train")


def test_a_list_of_classes_with_spaces(tmp_path: Path) -> None:
    benchmark_data.stanford_cars(tmp_path)
    (tmp_path / "classes.txt").write_text("BMW M3\n")
    some = open_split(recipe(tmp_path, class_list=str(tmp_path / "classes.txt")), "train")
    assert some.classes == ("BMW M3",)


def test_places365_takes_both_parts_of_one_size(tmp_path: Path) -> None:
    benchmark_data.places365(tmp_path)
    (tmp_path / "val_large").mkdir()
    (path, *_) = open_split(recipe(tmp_path), "test").paths
    assert path.parent.name == "val_256"


def test_several_labels_are_refused_where_one_is_needed(tmp_path: Path) -> None:
    benchmark_data.write_voc2007(tmp_path, num=12)
    keys = ["data.name=voc2007", f"data.root={tmp_path}", "epochs=1", "warmup_epochs=0", "batch_size=8"]
    done = CliRunner().invoke(app, ["pretrain", "cifar100_simclr", *keys, "data.storage=stream", "--dry-run"])
    assert isinstance(done.exception, ConfigError)
    assert "have several labels each, which kNN cannot be tested on; set monitor=null" in str(done.exception)
    with pytest.raises(DataError, match="its images have several labels each"):
        mixmask.knn(torch.nn.Flatten(), tmp_path)


def test_every_kind_is_registered_once() -> None:
    assert {*SETS, "voc2007", "caltech101", "eurosat"} <= {*KINDS.by_name()}
    with pytest.raises(ConfigError, match="there is no kind of data 'food'; valid: food101"):
        KINDS.get("food", "data.layout")
