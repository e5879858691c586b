"""Detection recipes that train in seconds on pictures the tests draw."""

from __future__ import annotations

from pathlib import Path

from mixmask.transfer import stage
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.recipe import load_transfer_recipe

SMALL = """
data: {name: small, root: ROOT, train: [TRAIN], test: [TEST], num_workers: 0}
batch_size: 2
reference_batch_size: null
iterations: 2
warmup_iterations: 1
min_size_train: [64]
min_size_test: 64
precise_bn_iterations: 2
checkpoint_every: 1
rpn: {anchor_sizes: [16, 32], pre_nms_train: 50, post_nms_train: 20, pre_nms_test: 50, post_nms_test: 10}
roi: {batch_per_image: 8, positive_fraction: 0.5, pooler_resolution: 4, detections_per_image: 5, score_threshold: 0.01}
"""
PYRAMID = """
detector:
  kind: fpn
  channels: 32
  rpn: {anchor_sizes: [8, 16, 32, 64, 128], pre_nms_train: 50, post_nms_train: 20, pre_nms_test: 50, post_nms_test: 10}
  roi: {batch_per_image: 8, positive_fraction: 0.5, detections_per_image: 5, score_threshold: 0.01}
  box_head: {num_conv: 2, conv_dim: 16, fc_dim: 32}
  mask_head: {num_conv: 2, conv_dim: 16}
"""
RETINANET = """
detector:
  kind: retinanet
  channels: 32
  num_conv: 1
  anchors: {sizes: [8, 16, 32, 64, 128], octaves: 2}
  detections_per_image: 5
"""
VOC = "protocol: detect_voc\nname: voc\n" + SMALL.replace("TRAIN", "2007/trainval").replace("TEST", "2007/test")
COCO = "protocol: detect_coco\nname: coco\n" + SMALL.replace("TRAIN", "train2017").replace("TEST", "val2017")


def with_detector(text: str, detector: str) -> str:
    """The config with another detector instead of C4."""
    kept = [line for line in text.splitlines() if not line.startswith(("rpn:", "roi:"))]
    return "\n".join([*kept, detector])


def with_pyramid(text: str) -> str:
    """The config with FPN instead of C4; its anchors fit small pictures."""
    return with_detector(text, PYRAMID)


def plan(text: str, root: Path, tmp_path: Path, backbone: Path, *overrides: str) -> stage.TransferPlan:
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("ROOT", str(root)))
    recipe = load_transfer_recipe(config, [f"backbone={backbone}", *overrides])
    return stage.plan(recipe, tmp_path / "runs")


def recipe_of(text: str, root: Path, tmp_path: Path, *overrides: str) -> DetectRecipe:
    config = tmp_path / "recipe.yaml"
    config.write_text(text.replace("ROOT", str(root)))
    recipe = load_transfer_recipe(config, ["backbone=x", *overrides])
    assert isinstance(recipe, DetectRecipe)
    return recipe
