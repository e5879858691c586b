"""Seconds of COCO's evaluation after detection: masks drawn and encoded, statistics, and matches for per-image statistics.

    python -m benchmarks.coco_evaluation [--pictures 5000] [--per-picture 100]

Against the usual way: each mask pasted into an array of the image's size, then encoded, then pycocotools. Pictures, objects
and detections are drawn at random (about 7 objects of 80 classes per picture, 640×480). Both ways get the same.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from benchmarks.measure import parser, report, seconds
from mixmask.transfer.detection.data.pictures import DetectionSet, Picture
from mixmask.transfer.detection.detector import Detections
from mixmask.transfer.detection.engines.torchvision import in_original_pixels
from mixmask.transfer.detection.results import metrics
from mixmask.transfer.detection.results.coco_matches import coco_matches
from mixmask.transfer.detection.results.metrics import FoundObject, coco_metrics

HEIGHT, WIDTH, CLASSES = 480, 640, 80


def boxes_of(rng: np.random.Generator, num: int) -> np.typing.NDArray[np.float64]:
    side = np.exp(rng.uniform(math.log(12), math.log(300), num))
    aspect = np.exp(rng.uniform(-0.6, 0.6, num))
    size = np.stack([np.minimum(side * aspect, WIDTH - 2), np.minimum(side / aspect, HEIGHT - 2)], axis=1)
    start = rng.uniform(0, 1, (num, 2)) * ([WIDTH, HEIGHT] - size)
    return np.concatenate([start, start + size], axis=1)


def outline(box: np.typing.NDArray[np.float64]) -> list[float]:
    turn = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    points: list[float] = (centre + half * np.stack([np.cos(turn), np.sin(turn)], axis=1)).ravel().tolist()
    return points


def make(pictures: int, per_picture: int, folder: Path) -> tuple[DetectionSet, list[Detections]]:
    """Annotations, and for each picture the output of a detector: boxes on and beside objects, 28×28 masks."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    shapes = F.interpolate(torch.rand(64, 1, 7, 7), size=28, mode="bilinear")[:, 0]
    annotations: list[dict[str, Any]] = []
    outputs = []
    for key in range(1, pictures + 1):
        num = rng.poisson(7.3)
        own, classes = boxes_of(rng, num), rng.integers(0, CLASSES, num)
        for box, label in zip(own, classes, strict=True):
            left, top, right, bottom = box.tolist()
            width, height = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": key, "category_id": int(label) + 1, "iscrowd": 0,
                    "bbox": [left, top, width, height], "area": width * height * math.pi / 4,
                    "segmentation": [outline(box)],
                }
            )  # fmt: skip
        found, labels = boxes_of(rng, per_picture), rng.integers(0, CLASSES, per_picture)
        near = (rng.random(per_picture) < 0.5).nonzero()[0] if num else []
        for place in near:
            which = rng.integers(num)
            found[place] = own[which] + rng.normal(0, 3, 4)
            labels[place] = classes[which]
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 2)
        scores = np.sort(rng.random(per_picture))[::-1].copy()
        outputs.append(
            Detections(
                torch.from_numpy(found).float(),
                torch.from_numpy(scores).float(),
                torch.from_numpy(labels),
                shapes[torch.from_numpy(rng.integers(0, len(shapes), per_picture))],
            )
        )
    document = {
        "images": [{"id": key, "width": WIDTH, "height": HEIGHT} for key in range(1, pictures + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class{number}"} for number in range(1, CLASSES + 1)],
    }
    file = folder / "instances.json"
    file.write_text(json.dumps(document))
    files = tuple(Picture(str(key), folder / f"{key}.jpg", WIDTH, HEIGHT, ()) for key in range(1, pictures + 1))
    names = tuple(f"class{number}" for number in range(1, CLASSES + 1))
    return DetectionSet(files, names, (file,), tuple(range(1, CLASSES + 1))), outputs


def pasted(mask: Tensor, box: Tensor) -> dict[str, Any]:
    """The usual way: bilinear sampling of the whole box into an image, then the code of that image."""
    left, top, right, bottom = box.tolist()
    x0, y0 = max(math.floor(left) - 1, 0), max(math.floor(top) - 1, 0)
    x1, y1 = min(math.ceil(right) + 1, WIDTH), min(math.ceil(bottom) + 1, HEIGHT)
    x = (torch.arange(x0, x1) + 0.5 - left) / (right - left) * 2 - 1
    y = (torch.arange(y0, y1) + 0.5 - top) / (bottom - top) * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
    image = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    image[y0:y1, x0:x1] = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0] >= 0.5
    code: dict[str, Any] = coco_mask.encode(np.asfortranarray(image.numpy().astype(np.uint8)))
    return code


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--pictures", type=int, default=5000)
    arguments.add_argument("--per-picture", type=int, default=100)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    size = torch.Size([HEIGHT, WIDTH])
    with tempfile.TemporaryDirectory() as folder:
        pictures, outputs = make(given.pictures, given.per_picture, Path(folder))
        found: dict[str, list[FoundObject]] = {"ours": [], "usual": []}
        took: dict[str, float] = {}
        results: dict[str, Any] = {}

        def ours() -> None:
            for index, one in enumerate(outputs):
                found["ours"] += in_original_pixels(one, index, size, WIDTH, HEIGHT)

        def usual() -> None:
            for index, one in enumerate(outputs):
                limits = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
                boxes = torch.minimum(one.boxes.clamp(min=0), limits)
                assert one.masks is not None
                for box, score, label, mask in zip(
                    boxes, one.scores.tolist(), one.labels.tolist(), one.masks, strict=True
                ):
                    left, top, right, bottom = box.tolist()
                    found["usual"].append(
                        FoundObject(index, label, score, (left, top, right, bottom), pasted(mask, box))
                    )

        def measured(name: str, what: str, call: Callable[[], object]) -> None:
            took[f"{name}: {what}"] = seconds(call)

        def statistics_of(name: str) -> None:
            results[name] = coco_metrics(found[name], pictures, ("bbox", "segm"))

        measured("ours", "masks", ours)
        backend = metrics.coco_backend()
        measured("ours", f"statistics ({backend})", lambda: statistics_of("ours"))
        measured("ours", "matches", lambda: [coco_matches(found["ours"], pictures, kind) for kind in ("bbox", "segm")])
        measured("usual", "masks", usual)
        metrics.coco_backend = lambda: "pycocotools"
        measured("usual", "statistics (pycocotools)", lambda: statistics_of("usual"))
    totals = {name: sum(value for key, value in took.items() if key.startswith(name)) for name in found}
    answer = {
        "question": f"Seconds of COCO's evaluation of {given.pictures:,} pictures × {given.per_picture} detections",
        **took,
        "ours": totals["ours"],
        "usual": totals["usual"],
        "ours_over_usual": totals["ours"] / totals["usual"],
        "largest_difference_of_a_metric": max(
            abs(results["ours"][key] - value) for key, value in results["usual"].items()
        ),
        "segm/AP": results["ours"]["segm/AP"],
    }
    command = f"python -m benchmarks.coco_evaluation --pictures {given.pictures} --per-picture {given.per_picture}"
    report("coco_evaluation", command, [answer], given.out)


if __name__ == "__main__":
    main()
