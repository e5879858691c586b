"""A small COCO of keypoints, made of the shapes' boxes; importing its fixture gives it to a test module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.results.metrics import FoundObject
from tests.transfer.detection.small_recipes import COCO, with_detector

NAMES = ["middle", "left_eye", "right_eye", "top", "bottom"]
PLACES = np.array([[0.5, 0.5], [0.3, 0.4], [0.7, 0.4], [0.5, 0.1], [0.5, 0.9]])  # in the box
SIGMAS = [0.05, 0.03, 0.03, 0.08, 0.08]
DETECTOR = f"""
detector:
  kind: keypoints
  channels: 32
  rpn: {{anchor_sizes: [8, 16, 32, 64, 128], pre_nms_train: 50, post_nms_train: 20, pre_nms_test: 50, post_nms_test: 10}}
  roi: {{batch_per_image: 8, positive_fraction: 0.5, detections_per_image: 5, score_threshold: 0.01}}
  box_head: {{fc_dim: 32}}
  keypoint_head: {{conv_dims: [16, 16]}}
  oks_sigmas: {SIGMAS}
"""
KEYPOINTS = with_detector(COCO, DETECTOR)


def keypoints_in(box: list[float], number: int) -> list[float]:
    """Whole pixels, as in COCO; some hidden, some not labelled, of every fourth object none."""
    left, top, width, height = box
    flags = [(2, 1, 2, 0, 2)[(number + place) % 5] if number % 4 else 0 for place in range(len(NAMES))]
    points = [
        (int(left + x * width), int(top + y * height), flag) if flag else (0, 0, 0)
        for (x, y), flag in zip(PLACES, flags, strict=True)
    ]
    return [value for point in points for value in point]


def write_keypoints(source: Path, root: Path, crowd: bool = False) -> Path:
    """COCO's pictures with ``person_keypoints_*.json``: all shapes are persons, every seventh a crowd if asked for."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).symlink_to(source / split)
        document: dict[str, Any] = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
        document["categories"] = [
            {"id": 1, "name": "person", "keypoints": NAMES, "skeleton": [[1, 2], [1, 3], [4, 1], [1, 5]]}
        ]
        for number, item in enumerate(document["annotations"]):
            item["category_id"] = 1
            item["keypoints"] = keypoints_in(item["bbox"], number)
            item["num_keypoints"] = sum(flag > 0 for flag in item["keypoints"][2::3])
            if crowd and number % 7 == 3:
                item.update(
                    iscrowd=1, keypoints=[0] * 15, num_keypoints=0, segmentation={"size": [0, 0], "counts": [0]}
                )
                size = next(one for one in document["images"] if one["id"] == item["image_id"])
                item["segmentation"] = {
                    "size": [size["height"], size["width"]],
                    "counts": [0, size["height"] * size["width"]],
                }
        (root / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(document))
    return root


def random_finds(pictures: DetectionSet, seed: int) -> list[FoundObject]:
    """Truth with noise, more than count, and anything; scores with ties."""
    rng = np.random.default_rng(seed)
    found = []
    for number, picture in enumerate(pictures.pictures):
        for instance in picture.instances * 2:
            assert instance.keypoints is not None
            noise = rng.normal(scale=float(rng.choice([0.3, 2, 30])), size=(5, 2))
            points = np.concatenate([instance.keypoints[:, :2] + noise, rng.random((5, 1))], axis=1)
            found.append((number, instance.box, points))
        for _ in range(15):
            corner = rng.random(2) * 40
            points = np.concatenate([corner + rng.random((5, 2)) * 20, rng.random((5, 1))], axis=1)
            found.append((number, (*corner.tolist(), *(corner + 20).tolist()), points))
    return [
        FoundObject(
            number, 0, float(np.float32(rng.integers(1, 40) / 40)), box, None, tuple(map(tuple, points.tolist()))
        )
        for number, box, points in found
    ]


@pytest.fixture(scope="session")
def persons(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_keypoints(coco, tmp_path_factory.mktemp("persons") / "coco")
