"""Small data sets in their real layouts: coloured shapes, and what class each pixel has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from mixmask.transfer.segmentation.recipe import SegmentationData

Pixels = np.typing.NDArray[np.uint8]
COLOURS = np.array([[20, 20, 20], [220, 30, 30], [30, 220, 30], [30, 30, 220]], dtype=np.uint8)


def picture(seed: int, height: int = 60, width: int = 80) -> tuple[Pixels, Pixels]:
    """An image of four fields of different colours, and the (H, W) class of each pixel."""
    rng = np.random.default_rng(seed)
    cells = rng.permuted(np.arange(4, dtype=np.uint8)).reshape(2, 2)
    labels = np.kron(cells, np.ones((height // 2, width // 2), dtype=np.uint8))
    noise = rng.integers(0, 20, (height, width, 3))
    return (COLOURS[labels] + noise).astype(np.uint8), labels


def save_labels(path: Path, labels: Pixels, palette: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels, mode="L")
    if palette:
        image = Image.fromarray(labels, mode="P")
        image.putpalette([value % 256 for value in range(768)])
    image.save(path)


def save_image(path: Path, image: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def make_voc(root: Path, num: int = 6) -> Path:
    """``num`` training images with VOC's maps, as many validation images, and as many with SBD's maps alone."""
    folder, sbd = root / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    names = {split: [f"{split}_{i:03d}" for i in range(num)] for split in ("train", "val", "more")}
    for place, name in enumerate(name for split in names.values() for name in split):
        image, labels = picture(place)
        save_image(folder / "JPEGImages" / f"{name}.jpg", image)
        labels[labels == 3] = 15
        if not name.startswith("more"):
            labels[0] = 255  # borders of objects are ignored
            save_labels(folder / "SegmentationClass" / f"{name}.png", labels)
        if not name.startswith("val"):
            (sbd / "cls").mkdir(parents=True, exist_ok=True)
            savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels, "Boundaries": np.zeros(1)}})
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("\n".join(names[split]) + "\n")
    # SBD's own lists are another split of the same years: some of its images are VOC's validation images.
    (sbd / "train.txt").write_text("\n".join([*names["more"][::2], *names["train"][:2], names["val"][0]]) + "\n")
    (sbd / "val.txt").write_text("\n".join([*names["more"][1::2], *names["train"][2:]]) + "\n")
    return root


def make_cityscapes(root: Path, num: int = 3) -> Path:
    ids = np.array([0, 7, 26, 33], dtype=np.uint8)  # unlabelled, road, car, bicycle
    for split, cities in {"train": ("aachen", "ulm"), "val": ("munster",)}.items():
        for city in cities:
            for i in range(num):
                image, labels = picture(i)
                name = f"{city}_{i:06d}_000019"
                save_image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
                save_labels(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids[labels], palette=False)
    return root


def make_folders(root: Path, num: int = 8) -> Path:
    for split in ("train", "val"):
        for i in range(num):
            image, labels = picture(i + (100 if split == "val" else 0))
            save_image(root / "images" / split / f"{i}.png", image)
            save_labels(root / "annotations" / split / f"{i}.png", labels)
    (root / "classes.txt").write_text("ground\nred\ngreen\nblue\n")
    return root


def data_of(root: Path, **keys: Any) -> SegmentationData:
    return SegmentationData.model_validate(
        {"name": "x", "root": str(root), "train": ["train"], "test": ["val"], **keys}
    )
