"""Run a detection recipe on one of the two engines, and save what it found."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixmask.engine import distributed
from mixmask.engine.late import torch
from mixmask.engine.predictions import MATCHES, SHEET
from mixmask.engine.progress import say
from mixmask.engine.storage import write_atomic
from mixmask.transfer.checkpoints.export import write_detectron2
from mixmask.transfer.detection.engines.setting import DetectionSetting, Outcome
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.detection.results.coco_matches import coco_matches
from mixmask.transfer.detection.results.metrics import FoundObject, voc_matches
from mixmask.transfer.detection.results.predictions import NAME, save_detections
from mixmask.transfer.detection.results.show import draw_sheet


def run_detection(recipe: DetectRecipe, setting: DetectionSetting) -> dict[str, float]:
    """Train and evaluate a detector with the recipe's engine; every rank gets the metrics.

    With ``save_predictions``, the run directory gets ``detections.json.gz``, ``matches_*.npz`` (for per-image
    statistics) and ``detections.jpg`` (some test pictures); with ``save_detector``, it gets ``detector.pth``, a
    checkpoint that Detectron2's own tools load.
    """
    say(f"{setting.title}: {recipe.engine}, {describe_schedule(recipe)}")
    unseen = setting.test_set.uncounted_classes()
    if unseen:
        counted = "left out of the means" if recipe.coco else "counted with an AP of 0 (as Detectron2 does)"
        say(f"{setting.title}: warning: classes without a test object that counts are {counted}: {', '.join(unseen)}")
    outcome = _with_engine(recipe, setting)
    distributed.on_rank0(lambda: _keep(recipe, setting, outcome))
    return outcome.metrics


def _keep(recipe: DetectRecipe, setting: DetectionSetting, outcome: Outcome) -> None:
    """Write what the recipe asks for beside the record."""
    if not outcome.found:
        say(f"{setting.title}: warning: no object was found with a score above the threshold, so all precisions are 0")
    if recipe.save_predictions:
        _keep_predictions(recipe, setting, outcome.found)
    if recipe.save_detector:
        content = {"model": outcome.detector, "__author__": "mixmask"}
        write_atomic(setting.run.path / "detector.pth", lambda file: torch.save(content, file))


def _keep_predictions(recipe: DetectRecipe, setting: DetectionSetting, found: Sequence[FoundObject]) -> None:
    """Write the detections, their matches with the true objects, and a sheet of sample pictures."""
    folder, pictures = setting.run.path, setting.test_set
    save_detections(folder / NAME, found, pictures)
    if recipe.coco:
        for kind in recipe.measures:
            coco_matches(found, pictures, kind).write(folder / MATCHES[kind])
    else:
        voc_matches(found, pictures).write(folder / MATCHES["bbox"])
    draw_sheet(folder / SHEET, found, pictures)


def _with_engine(recipe: DetectRecipe, setting: DetectionSetting) -> Outcome:
    if recipe.engine == "torchvision":
        from mixmask.transfer.detection.engines import torchvision as torchvision_engine

        return torchvision_engine.run(recipe, setting)
    # Imported here, because Detectron2 is optional.
    from mixmask.transfer.detection.engines import detectron2 as detectron2_engine

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "trunk.pkl"
        write_detectron2(weights, setting.state)
        return detectron2_engine.run(recipe, setting, weights)


def describe_schedule(recipe: DetectRecipe) -> str:
    """The schedule in force (iterations, learning rate, steps, warm-up), and what it was scaled from."""
    milestones = ", ".join(str(recipe.scaled_length(m)) for m in recipe.milestones) or "none"
    text = (
        f"{recipe.scaled_length(recipe.iterations):,} iterations of {recipe.batch_size} images, lr {recipe.scaled_lr:g}, "
        f"steps {milestones}, warm-up {recipe.warmup_in_force}"
    )
    if recipe.scale == 1:
        return text
    steps = ", ".join(str(m) for m in recipe.milestones) or "none"
    return (
        f"{text} (scaled linearly from {recipe.iterations:,} of {recipe.reference_batch_size}, lr {recipe.lr:g}, steps "
        f"{steps}, warm-up {recipe.warmup_iterations})"
    )
