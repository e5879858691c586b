"""Tiny data sets in the layouts of public ones, written as their archives unpack."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def picture(path: Path, number: int) -> None:
    """A small JPEG whose colour depends on a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    noise = rng.integers(0, 60, (40, 48, 3)) + np.array([(number * 37) % 190, (number * 91) % 190, (number * 13) % 190])
    Image.fromarray(noise.astype(np.uint8)).save(path)


def write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_voc2007(root: Path, num: int = 6, classes: tuple[str, ...] = ("aeroplane", "bicycle", "cat")) -> Path:
    """``num`` images for training and validation and as many for testing; every image has one or two classes."""
    home = root / "VOCdevkit" / "VOC2007"
    names = {"trainval": [f"{i:06d}" for i in range(num)], "test": [f"{i:06d}" for i in range(num, 2 * num)]}
    for number, name in enumerate([*names["trainval"], *names["test"]]):
        picture(home / "JPEGImages" / f"{name}.jpg", number % len(classes))
    lists = home / "ImageSets" / "Main"
    for split, own in names.items():
        write(lists / f"{split}.txt", own)
        for label, cls in enumerate(classes):
            values = [
                1 if i % 3 == label else 0 if (i + label) % 7 == 0 else 1 if (i + label) % 5 == 0 else -1
                for i in range(num)
            ]
            write(lists / f"{cls}_{split}.txt", [f"{name} {value:2d}" for name, value in zip(own, values)])
    write(lists / "train.txt", names["trainval"][::2])
    write(lists / "val.txt", names["trainval"][1::2])
    return root


def food101(root: Path) -> None:
    home = root / "food-101"
    for split, start in (("train", 0), ("test", 3)):
        listed = {name: [f"{name}/{n + start}" for n in range(3)] for name in ("apple_pie", "waffles")}
        for names in listed.values():
            for number, name in enumerate(names):
                picture(home / "images" / f"{name}.jpg", number)
        (home / "meta").mkdir(exist_ok=True)
        (home / "meta" / f"{split}.json").write_text(json.dumps(listed))


def sun397(root: Path) -> None:
    home = root / "SUN397"
    write(home / "ClassName.txt", ["/a/abbey", "/c/cabin/indoor"])
    for split, start in (("Training", 0), ("Testing", 3)):
        names = [f"/{cls}/sun_{n + start}.jpg" for cls in ("a/abbey", "c/cabin/indoor") for n in range(3)]
        for number, name in enumerate(names):
            picture(home / name.strip("/"), number)
        write(home / f"{split}_01.txt", names)


def stanford_cars(root: Path) -> None:
    home = root / "stanford_cars"
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        annotations = np.zeros(6, dtype=[("fname", object), ("class", object)])
        for n in range(6):
            annotations[n] = (f"{n:05d}.jpg", n % 2 + 1)
            picture(home / f"cars_{split}" / f"{n:05d}.jpg", n)
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        savemat(home / file, {"annotations": annotations})
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": np.array(["BMW M3", "Audi TT"], dtype=object)})


def fgvc_aircraft(root: Path) -> None:
    home = root / "fgvc-aircraft-2013b" / "data"
    variants = ["707-320", "Cessna 172"]
    write(home / "variants.txt", variants)
    lines = [f"{n:07d} {variants[n % 2]}" for n in range(12)]
    for n in range(12):
        picture(home / "images" / f"{n:07d}.jpg", n)
    for split, part in (("trainval", lines[:8]), ("train", lines[:4]), ("val", lines[4:8]), ("test", lines[8:])):
        write(home / f"images_variant_{split}.txt", part)


def dtd(root: Path) -> None:
    home = root / "dtd" / "dtd"
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{cls}/{cls}_{number}{n}.jpg" for cls in ("banded", "zigzagged") for n in range(2)]
        for name in names:
            picture(home / "images" / name, number)
        write(home / "labels" / f"{split}1.txt", names)


def oxford_pets(root: Path) -> None:
    home = root / "oxford-iiit-pet"
    for split, start in (("trainval", 0), ("test", 3)):
        names = [
            (f"{breed}_{n + start}", label)
            for label, breed in enumerate(("Abyssinian", "great_pyrenees"), 1)
            for n in range(3)
        ]
        for number, (name, _) in enumerate(names):
            picture(home / "images" / f"{name}.jpg", number)
        write(home / "annotations" / f"{split}.txt", [f"{name} {label} 1 1" for name, label in names])


def caltech101(root: Path) -> None:
    home = root / "caltech101" / "101_ObjectCategories"
    for cls, num in (("BACKGROUND_Google", 3), ("accordion", 33), ("yin_yang", 32)):
        for n in range(num):
            picture(home / cls / f"image_{n:04d}.jpg", n)


def flowers102(root: Path) -> None:
    home = root / "flowers-102"
    for n in range(1, 13):
        picture(home / "jpg" / f"image_{n:05d}.jpg", n)
    savemat(home / "imagelabels.mat", {"labels": np.array([[n % 2 + 1 for n in range(12)]])})
    savemat(home / "setid.mat", {"trnid": [[1, 2, 3, 4]], "valid": [[5, 6, 7, 8]], "tstid": [[9, 10, 11, 12]]})


def cub200(root: Path) -> None:
    home = root / "CUB_200_2011"
    names = [f"{cls}/{n}.jpg" for cls in ("001.Black_footed_Albatross", "002.Laysan_Albatross") for n in range(4)]
    for number, name in enumerate(names):
        picture(home / "images" / name, number)
    write(home / "images.txt", [f"{n} {name}" for n, name in enumerate(names, 1)])
    write(home / "train_test_split.txt", [f"{n} {n % 2}" for n in range(1, 9)])


def eurosat(root: Path) -> None:
    for cls in ("Forest", "River"):
        for n in range(5):
            picture(root / "eurosat" / "2750" / cls / f"{cls}_{n}.jpg", n)


def places365(root: Path) -> None:
    write(root / "categories_places365.txt", ["/a/airfield 0", "/b/bow_window/indoor 1"])
    names = [f"/{cls}/{n:08d}.jpg" for cls in ("a/airfield", "b/bow_window/indoor") for n in range(3)]
    for number, name in enumerate(names):
        picture(root / "data_256_standard" / name.strip("/"), number)
    write(root / "places365_train_standard.txt", [f"{name} {number // 3}" for number, name in enumerate(names)])
    for n in range(4):
        picture(root / "val_256" / f"Places365_val_{n:08d}.jpg", n)
    write(root / "places365_val.txt", [f"Places365_val_{n:08d}.jpg {n % 2}" for n in range(4)])


def places205(root: Path) -> None:
    images = root / "data" / "vision" / "torralba" / "deeplearning" / "images256"
    for split, start in (("train", 0), ("val", 3)):
        names = [f"{cls}/gsun_{n + start}.jpg" for cls in ("a/abbey", "b/basilica") for n in range(3)]
        for number, name in enumerate(names):
            picture(images / name, number)
        lines = [f"{name} {number // 3}" for number, name in enumerate(names)]
        write(root / "trainvalsplit_places205" / f"{split}_places205.csv", lines)


def inaturalist2018(root: Path) -> None:
    for split, start in (("train", 0), ("val", 4)):
        images = [{"id": n, "file_name": f"train_val2018/Insecta/{n % 2}/{n}.jpg"} for n in range(start, start + 4)]
        for image in images:
            picture(root / str(image["file_name"]), int(str(image["id"])))
        document = {
            "images": images,
            "annotations": [{"id": n, "image_id": n, "category_id": n % 2} for n in range(start, start + 4)],
            "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
        }
        (root / f"{split}2018.json").write_text(json.dumps(document))
