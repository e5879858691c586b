"""Read VOC devkits and COCO JSON into one form, and report errors in them before training starts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, UnidentifiedImageError

from mixmask.engine.damage import check_files
from mixmask.engine.errors import DataError, listed
from mixmask.engine.progress import say
from mixmask.engine.texts import read_bytes, read_text
from mixmask.transfer.detection.data.coco_checks import check_document
from mixmask.transfer.detection.data.keypoints import Keypoints, read_keypoints
from mixmask.transfer.detection.data.pictures import DetectionSet, Instance, Outline, Picture, Points
from mixmask.transfer.detection.recipe import DetectRecipe

MAX_XML = 1 << 26
EXIF_ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)


def open_detection(recipe: DetectRecipe) -> tuple[DetectionSet, DetectionSet]:
    """Read the training and the test pictures of a recipe, and check every annotation and image file.

    Raises:
        DataError: If a folder, list, annotation or image is missing or damaged, an image has another size than its
            annotation says, or a class is unknown.
    """
    root, classes = _root(recipe), _classes(recipe)
    train, test = _read(recipe, recipe.data.train, classes), _read(recipe, recipe.data.test, classes)
    if train.classes != test.classes:
        raise DataError(f"{root}: the classes of {recipe.data.train} and {recipe.data.test} differ")
    if not recipe.data.allow_overlap:
        _require_apart(recipe, train, test)
    pictures = {picture.path: picture for split in (train, test) for picture in split.pictures}
    check_files(list(pictures))
    _check_sizes(list(pictures.values()))
    if not any(not (i.difficult or i.crowd) for picture in test.pictures for i in picture.instances):
        raise DataError(f"{root}: the test pictures of {', '.join(recipe.data.test)} contain no object that counts")
    return train.for_training(recipe.masks), test


def _require_apart(recipe: DetectRecipe, train: DetectionSet, test: DetectionSet) -> None:
    """Refuse test pictures that are training pictures, too, even if a folder is reached by two names."""
    for split, names in ((train, recipe.data.train), (test, recipe.data.test)):
        twice = [path for path, count in Counter(_resolved(split)).items() if count > 1]
        if twice:
            raise DataError(f"{twice[0]}: is listed twice in {', '.join(names)}; list every split once")
    both = set(_resolved(train)) & set(_resolved(test))
    if both:
        raise DataError(
            f"{min(both)}: is both a training and a test picture, as are {len(both) - 1} more of "
            f"{', '.join(recipe.data.train)} and {', '.join(recipe.data.test)}: a score on it would mean nothing. "
            f"data.allow_overlap=true allows it"
        )


def _resolved(pictures: DetectionSet) -> list[Path]:
    """The pictures' files without symbolic links; each folder is resolved once, not once per picture."""
    folders = {folder: folder.resolve() for folder in {picture.path.parent for picture in pictures.pictures}}
    return [
        picture.path.resolve() if picture.path.is_symlink() else folders[picture.path.parent] / picture.path.name
        for picture in pictures.pictures
    ]


def open_test(recipe: DetectRecipe) -> DetectionSet:
    """Read the annotations of the test pictures.

    Raises:
        DataError: If a folder, list or annotation is missing or damaged, or a class is unknown.
    """
    return _read(recipe, recipe.data.test, _classes(recipe))


def _root(recipe: DetectRecipe) -> Path:
    root = Path(recipe.data.root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder (data.root of '{recipe.data.name}')")
    return root


def _classes(recipe: DetectRecipe) -> tuple[str, ...] | None:
    """The recipe's classes. If it has none: None for COCO, whose files name them; for VOC, those of all splits.

    A single split of VOC may lack a rare class.
    """
    if recipe.data.classes is not None or recipe.coco:
        return recipe.data.classes
    return _read_voc(_root(recipe), (*recipe.data.train, *recipe.data.test), None).classes


def _read(recipe: DetectRecipe, splits: tuple[str, ...], classes: Sequence[str] | None) -> DetectionSet:
    if recipe.coco:
        return _read_coco(recipe, splits, classes, evaluated=splits == recipe.data.test)
    return _read_voc(_root(recipe), splits, classes)


def _check_sizes(pictures: Sequence[Picture]) -> None:
    """Compare each image's size, after EXIF rotation, with its annotation's: boxes for another size are wrong."""

    def problem(picture: Picture) -> str | None:
        try:
            with Image.open(picture.path) as image:
                turned = image.getexif().get(EXIF_ORIENTATION, 1) in SIDEWAYS
                width, height = image.size[::-1] if turned else image.size
        except (OSError, SyntaxError, UnidentifiedImageError) as error:
            return f"{picture.path}: not a readable image ({error})"
        if (width, height) != (picture.width, picture.height):
            return (
                f"{picture.path}: is {width}×{height} pixels, its annotation says {picture.width}×{picture.height}: "
                f"its boxes belong to another image"
            )
        return None

    with ThreadPoolExecutor(8) as pool:
        problems = [found for found in pool.map(problem, pictures) if found is not None]
    if problems:
        raise DataError(*listed(problems))


# --- VOC -------------------------------------------------------------------------------------------------------------


def _read_voc(root: Path, splits: Sequence[str], classes: Sequence[str] | None) -> DetectionSet:
    found: list[tuple[Path, str, str]] = []
    for split in splits:
        year, _, name = split.partition("/")
        folder = root / f"VOC{year}"
        listing = folder / "ImageSets" / "Main" / f"{name}.txt"
        if not name or not listing.is_file():
            there = sorted(f"{p.parts[-4][3:]}/{p.stem}" for p in root.glob("VOC*/ImageSets/Main/*.txt"))
            raise DataError(
                f"{listing}: no such image list (data.root, and '{split}' of data.train or data.test). Lists there: "
                f"{', '.join(there) or 'none'}"
            )
        # The lists of single classes have a second column (1, -1 or 0).
        names = [line.split()[0] for line in read_text(listing).splitlines() if line.strip()]
        if not names:
            raise DataError(f"{listing}: empty")
        found += [(folder, f"{year}/{image}", image) for image in names]
    parsed = [(_parse_xml(folder / "Annotations" / f"{image}.xml"), folder, key, image) for folder, key, image in found]
    if classes is None:
        classes = sorted({name for (_, objects), *_ in parsed for name, *_ in objects})
    index = {name: label for label, name in enumerate(classes)}
    pictures = []
    for ((width, height), objects), folder, key, image in parsed:
        xml = folder / "Annotations" / f"{image}.xml"
        path = folder / "JPEGImages" / f"{image}.jpg"
        if not path.is_file():
            raise DataError(f"{path}: no such image, though {xml} describes it")
        instances = []
        for name, box, difficult in objects:
            if name not in index:
                raise DataError(
                    f"{xml}: unknown class '{name}'; valid: {', '.join(classes)} (data.classes; null takes all there are)"
                )
            left, top, right, bottom = box
            if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                raise DataError(
                    f"{xml}: the box {left + 1:g} {top + 1:g} {right:g} {bottom:g} of '{name}' lies outside the image of "
                    f"{width}×{height} or is empty"
                )
            instances.append(Instance(box, index[name], difficult=difficult))
        pictures.append(Picture(key, path, width, height, tuple(instances)))
    return DetectionSet(tuple(pictures), tuple(classes))


def _parse_xml(
    path: Path,
) -> tuple[tuple[int, int], list[tuple[str, tuple[float, float, float, float], bool]]]:
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file")
    try:
        root = ElementTree.fromstring(read_bytes(path, MAX_XML))
        size = (int(_text(root, "size/width")), int(_text(root, "size/height")))
        objects = []
        for node in root.iter("object"):
            left, top, right, bottom = (float(_text(node, f"bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax"))
            difficult = node.findtext("difficult", "0").strip() == "1"
            objects.append((_text(node, "name"), (left - 1, top - 1, right, bottom), difficult))
        return size, objects
    except (
        ElementTree.ParseError,
        ValueError,
        LookupError,
        OverflowError,
    ) as error:  # LookupError: an unknown encoding
        raise DataError(f"{path}: damaged annotation ({error})") from None


def _text(node: ElementTree.Element, tag: str) -> str:
    text = node.findtext(tag)
    if text is None or not text.strip():
        raise ValueError(f"no <{tag}>")
    return text.strip()


# --- COCO ------------------------------------------------------------------------------------------------------------


def _read_coco(
    recipe: DetectRecipe, splits: Sequence[str], classes: Sequence[str] | None, evaluated: bool
) -> DetectionSet:
    """Read COCO JSON; ``evaluated`` also requires the fields that COCO's evaluation needs and training does not."""
    pictures: list[Picture] = []
    names: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    keypoints: Keypoints | None = None
    root, sigmas = _root(recipe), recipe.detector.sigmas
    files = tuple(recipe.coco_file(split) for split in splits)
    for split, file in zip(splits, files, strict=True):
        document = _load_json(file)
        remark = check_document(document, file, evaluated, sigmas)
        if remark is not None:
            say(remark)
        # By id, the order of classes in COCOeval and Detectron2.
        categories = sorted(document["categories"], key=lambda category: category["id"])
        found = tuple(category["name"] for category in categories)
        if names and found != names:
            raise DataError(f"{file}: its categories differ from those of {files[0]}")
        if sigmas:
            keypoints = read_keypoints(categories, file, sigmas)
        names, ids = found, tuple(category["id"] for category in categories)
        pictures += _coco_pictures(
            document, {i: n for n, i in enumerate(ids)}, root / split, file, evaluated, bool(sigmas)
        )
    if evaluated and len({picture.key for picture in pictures}) < len(pictures):
        raise DataError(f"{files[0]} and the other test files use the same image ids: evaluate one of them at a time")
    if classes is not None and tuple(classes) != names:
        raise DataError(f"{files[0]}: its {len(names)} categories are not the {len(classes)} classes of the recipe")
    return DetectionSet(tuple(pictures), names, files, ids, keypoints)


def _load_json(path: Path) -> Any:
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob("*.json"))
        raise DataError(
            f"{path}: no such annotation file (data.root, and the splits data.train and data.test); "
            f"{path.parent} has {', '.join(there[:8]) or 'none'}"
        )
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: truncated or not JSON ({error})") from None
    except RecursionError:
        raise DataError(f"{path}: not a COCO annotation file: nested too deeply") from None


def _coco_pictures(
    document: Any, index: dict[int, int], folder: Path, file: Path, evaluated: bool, keypoints: bool
) -> list[Picture]:
    """The pictures of a document that `check_document` has let pass."""
    objects: dict[int, list[Instance]] = {image["id"]: [] for image in document["images"]}
    for item in document["annotations"]:
        left, top, width, height = (float(v) for v in item["bbox"])
        crowd = bool(item.get("iscrowd", 0))
        outline = item.get("segmentation", [])
        polygons: tuple[Outline, ...] = ()
        if isinstance(outline, list):
            # As in Detectron2, polygons of fewer than three points are left out.
            polygons = tuple(np.array(p, dtype=np.float64) for p in outline if len(p) >= 6 and len(p) % 2 == 0)
        elif outline and not crowd and not evaluated and not keypoints:
            raise DataError(
                f"{file}: annotation {item['id']} has a run-length mask and is no crowd; training needs polygons"
            )
        objects[item["image_id"]].append(
            Instance(
                (left, top, left + width, top + height),
                index[item["category_id"]],
                polygons,
                False,
                crowd,
                _points(item["keypoints"]) if keypoints else None,
            )
        )
    pictures = []
    for image in document["images"]:
        path = folder / image["file_name"]
        if not path.is_file():
            raise DataError(f"{path}: no such image, though {file} lists it")
        pictures.append(
            Picture(
                str(image["id"]),
                path,
                image["width"],
                image["height"],
                tuple(objects[image["id"]]),
            )
        )
    return pictures


def _points(numbers: Sequence[float]) -> Points:
    """(K, 3); COCO's keypoints are numbers of pixels, whose middles are meant here as in Detectron2."""
    points = np.array(numbers, dtype=np.float64).reshape(-1, 3)
    points[:, :2] += 0.5
    return points
