"""Synthetic pictures in the real on-disk formats: ImageFolder, a VOC devkit, COCO json with polygons.

Ten classes are told apart by shape and texture (``striped-star``, ``spotted-disk``, …). Size, place, rotation, texture
scale and tints are drawn at random, and the backgrounds are cluttered with strokes and blobs: colour says nothing about
the class, and no single pixel does. Everything is drawn from a seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]

SHAPES = ("disk", "star")
TEXTURES = ("checked", "plain", "ringed", "spotted", "striped")
CLASSES = tuple(f"{texture}-{shape}" for texture in TEXTURES for shape in SHAPES)
TINT = 0.12  # a colour channel deviates from grey by at most this
OVERSAMPLING = 2  # edges are drawn at twice the resolution and averaged


@dataclass(frozen=True)
class Object:
    """One drawn object: its class and its outline as (P, 2) x, y in pixels."""

    label: int
    outline: Points

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the part inside the picture."""
        inside = np.clip(self.outline, 0, [width, height])
        left, top = inside.min(axis=0)
        right, bottom = inside.max(axis=0)
        return float(left), float(top), float(right), float(bottom)


def _outline(shape: str) -> Points:
    """A shape of radius about 1 around the origin."""
    return _polygon(24, [1.0]) if shape == "disk" else _polygon(10, [1.15, 0.5])


def _polygon(corners: int, radii: list[float]) -> Points:
    angle = np.arange(corners) * 2 * np.pi / corners
    radius = np.resize(radii, corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _colour(rng: np.random.Generator, low: float, high: float) -> Pixels:
    """A brightness in [low, high] with a slight tint."""
    colour = rng.uniform(low, high) + rng.uniform(-TINT, TINT, 3)
    return np.clip(colour, 0, 1).astype(np.float32)


def _background(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Soft patches of colour under strokes and blobs."""
    coarse = rng.uniform(0.4, 0.6, (4, 4, 1)) + rng.uniform(-TINT, TINT, (4, 4, 3))
    image = Image.fromarray((coarse * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(max(6, width * height // 400)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        length, angle = rng.uniform(3, 0.2 * width + 3), rng.uniform(0, 2 * np.pi)
        colour = tuple(int(255 * c) for c in _colour(rng, 0.25, 0.75))
        if rng.random() < 0.6:
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line([(x, y), end], fill=colour, width=int(rng.integers(1, 3)))
        else:
            radius = 0.3 * length
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _texture(rng: np.random.Generator, texture: str, x: Pixels, y: Pixels, period: float) -> Pixels:
    """0 (dark) to 1 (bright) per pixel, edges softened over about a pixel; ``x`` and ``y`` count from the centre."""
    angle = rng.uniform(0, np.pi)
    u = (x * math.cos(angle) + y * math.sin(angle)) / period + rng.uniform()
    v = (y * math.cos(angle) - x * math.sin(angle)) / period + rng.uniform()
    if texture == "plain":
        return np.full_like(x, rng.uniform(0, 1))
    wave = {
        "striped": np.sin(2 * np.pi * u),
        "checked": np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v) * 1.5,
        "spotted": 2 * (0.36 - np.hypot((u % 1) - 0.5, (v % 1) - 0.5)) / 0.36,
        "ringed": np.sin(2 * np.pi * np.hypot(x, y) / period),
    }[texture]
    result: Pixels = np.clip(0.5 + wave * period / 2.5, 0, 1).astype(np.float32)
    return result


def _paint(rng: np.random.Generator, canvas: Pixels, label: int, centre: tuple[float, float], radius: float) -> Object:
    """Draw one object onto the canvas in place."""
    texture, shape = CLASSES[label].split("-")
    height, width = canvas.shape[:2]
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.15)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    outline = (_outline(shape) * [stretch, 1 / stretch]) @ turn.T * radius + centre
    k = OVERSAMPLING
    large = Image.new("L", (width * k, height * k))
    ImageDraw.Draw(large).polygon([(x * k, y * k) for x, y in outline], fill=255)
    cover = np.asarray(large.reduce(k), dtype=np.float32)[..., None] / 255
    first, second = _colour(rng, 0.0, 0.3), _colour(rng, 0.7, 1.0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    pattern = _texture(rng, texture, x - centre[0], y - centre[1], rng.uniform(0.28, 0.4) * radius)[..., None]
    canvas[:] = canvas * (1 - cover) + cover * (pattern * first + (1 - pattern) * second)
    return Object(label, outline)


def _finish(rng: np.random.Generator, canvas: Pixels) -> Image.Image:
    noisy = canvas * rng.uniform(0.9, 1.05) + rng.normal(0, 0.02, canvas.shape)
    return Image.fromarray((np.clip(noisy, 0, 1) * 255).astype(np.uint8))


def classification_image(rng: np.random.Generator, label: int, size: int) -> Image.Image:
    """One object of the class, near the middle of a cluttered square picture."""
    canvas = _background(rng, size, size).copy()
    radius = rng.uniform(0.36, 0.5) * size
    centre = (size * rng.uniform(0.38, 0.62), size * rng.uniform(0.38, 0.62))
    _paint(rng, canvas, label, centre, radius)
    return _finish(rng, canvas)


def detection_image(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, list[Object]]:
    """One to three objects of different sizes; a later one may hide a part of an earlier one, never most of it."""
    canvas = _background(rng, width, height).copy()
    objects: list[Object] = []
    for _ in range(int(rng.integers(1, 4))):
        radius = rng.uniform(0.25, 0.48) * min(width, height)
        # An object without a free place after 20 attempts is left out.
        for _ in range(20):
            centre = (
                rng.uniform(0.6 * radius, width - 0.6 * radius),
                rng.uniform(0.6 * radius, height - 0.6 * radius),
            )
            clear = all(np.hypot(*(np.mean(o.outline, axis=0) - centre)) > 1.1 * radius for o in objects)
            if clear:
                objects.append(_paint(rng, canvas, int(rng.integers(len(CLASSES))), centre, radius))
                break
    return _finish(rng, canvas), objects


# --- formats ---------------------------------------------------------------------------------------------------------


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)


def write_classification(root: Path, *, size: int, train_per_class: int, val_per_class: int, seed: int) -> None:
    """``root/{train,val}/<class>/<number>.jpg``, square pictures of ``size`` pixels."""
    for split, count in (("train", train_per_class), ("val", val_per_class)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                # A generator per image: its content does not depend on how many others are drawn.
                rng = np.random.default_rng([seed, split == "val", label, number])
                _save(classification_image(rng, label, size), root / split / name / f"{number:05d}.jpg")


def _detection_set(
    seed: int, split: int, count: int, size: tuple[int, int]
) -> Iterator[tuple[Image.Image, list[Object]]]:
    for number in range(count):
        rng = np.random.default_rng([seed, 10 + split, number])
        width, height = size if rng.random() < 0.7 else size[::-1]
        yield detection_image(rng, width, height)


def write_voc(root: Path, *, size: tuple[int, int], train: int, test: int, seed: int) -> None:
    """A VOC devkit in ``root/VOC2007``: JPEGImages, Annotations and ImageSets/Main/{trainval,test}.txt."""
    folder = root / "VOC2007"
    number = 0
    for split, count in (("trainval", train), ("test", test)):
        names = []
        for image, objects in _detection_set(seed, int(split == "test"), count, size):
            number += 1
            name = f"{number:06d}"
            names.append(name)
            _save(image, folder / "JPEGImages" / f"{name}.jpg")
            _write_xml(folder / "Annotations" / f"{name}.xml", name, image.size, objects)
        listing = folder / "ImageSets" / "Main" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"{name}\n" for name in names))


def _write_xml(path: Path, name: str, size: tuple[int, int], objects: list[Object]) -> None:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, tag: str, text: object) -> None:
        ElementTree.SubElement(parent, tag).text = str(text)

    add(root, "folder", "VOC2007")
    add(root, "filename", f"{name}.jpg")
    shape = ElementTree.SubElement(root, "size")
    for tag, value in (("width", size[0]), ("height", size[1]), ("depth", 3)):
        add(shape, tag, value)
    add(root, "segmented", 0)
    for item in objects:
        node = ElementTree.SubElement(root, "object")
        add(node, "name", CLASSES[item.label])
        for tag, text in (("pose", "Unspecified"), ("truncated", 0), ("difficult", 0)):
            add(node, tag, text)
        left, top, right, bottom = item.box(*size)
        box = ElementTree.SubElement(node, "bndbox")  # 1-based and inclusive, as VOC's annotators counted
        add(box, "xmin", int(left) + 1)
        add(box, "ymin", int(top) + 1)
        add(box, "xmax", min(math.ceil(right), size[0]))
        add(box, "ymax", min(math.ceil(bottom), size[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(path)


def write_coco(root: Path, *, size: tuple[int, int], train: int, val: int, seed: int) -> None:
    """``root/{train2017,val2017}/*.jpg`` and ``root/annotations/instances_{train2017,val2017}.json`` with polygons."""
    for split, count in (("train2017", train), ("val2017", val)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        # The demo's config gives VOC and COCO one seed; + 1 makes their images differ.
        for image, objects in _detection_set(seed + 1, int(split == "val2017"), count, size):
            image_id = len(images) + 1
            file_name = f"{image_id:012d}.jpg"
            _save(image, root / split / file_name)
            images.append({"id": image_id, "file_name": file_name, "width": image.width, "height": image.height})
            for item in objects:
                left, top, right, bottom = item.box(*image.size)
                outline = np.clip(item.outline, 0, image.size)
                x, y = outline.T
                area = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": item.label + 1,
                        "bbox": [round(v, 2) for v in (left, top, right - left, bottom - top)],
                        "area": round(area, 2),
                        "iscrowd": 0,
                        "segmentation": [[round(float(v), 2) for v in outline.ravel()]],
                    }
                )
        document = {
            "info": {"description": "synthetic shapes and textures"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)],
        }
        target = root / "annotations" / f"instances_{split}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(document))
