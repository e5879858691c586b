from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.decoding import decode
from mixmask.launch.demo import demo_data


def digest(root: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            content.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return content.hexdigest()


def test_everything_is_drawn_from_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo_data.write_classification(tmp_path / name, size=32, train_per_class=2, val_per_class=1, seed=seed)
        demo_data.write_voc(tmp_path / name, size=(64, 48), train=2, test=1, seed=seed)
        demo_data.write_coco(tmp_path / name, size=(64, 48), train=2, val=1, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_training_and_test_pictures_differ(shapes: Path) -> None:
    data = DataRecipe(name="x", root=str(shapes))
    train = {path.read_bytes() for path in open_split(data, "train").paths}
    assert not any(path.read_bytes() in train for path in open_split(data, "test").paths)


def test_mean_colour_does_not_tell_the_class(tmp_path: Path) -> None:
    """Nearest class mean in average colour: little better than the 10 % of chance."""
    demo_data.write_classification(tmp_path, size=32, train_per_class=30, val_per_class=10, seed=0)
    data = DataRecipe(name="x", root=str(tmp_path))

    def colours(split: str) -> tuple[np.ndarray, np.ndarray]:
        images = open_split(data, split)
        pixels = np.stack([decode(path).float().mean(dim=(1, 2)).numpy() for path in images.paths])
        return pixels, images.labels.numpy()

    (train, labels), (test, truth) = colours("train"), colours("test")
    means = np.stack([train[labels == label].mean(axis=0) for label in range(10)])
    predicted = np.linalg.norm(test[:, None] - means[None], axis=2).argmin(axis=1)
    assert (predicted == truth).mean() < 0.35


def test_coco_boxes_and_areas_fit_their_polygons(coco: Path) -> None:
    document = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
    assert len(document["categories"]) == 10
    assert len(document["annotations"]) > len(document["images"])
    for item in document["annotations"]:
        points = np.reshape(item["segmentation"][0], (-1, 2))
        left, top, width, height = item["bbox"]
        assert points.min(0) == pytest.approx((left, top), abs=0.02)
        assert points.max(0) == pytest.approx((left + width, top + height), abs=0.02)
        assert left + width <= sizes[item["image_id"]][0] + 0.01
        assert 0 < item["area"] <= width * height + 0.1
