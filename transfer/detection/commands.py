"""Commands for detection besides running it: write a Detectron2 config, draw detections."""

from __future__ import annotations

from pathlib import Path

from mixmask.engine.errors import ConfigError, RunDirectoryError
from mixmask.engine.storage import RunDirectory, require_output_file
from mixmask.transfer.checkpoints.export import write_detectron2
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.detection.results.show import show_detections as draw
from mixmask.transfer.recipe import load_transfer_recipe
from mixmask.transfer.stage import TransferPlan


def dump_detectron2_config(plan: TransferPlan, file: Path, force: bool = False) -> str:
    """Write a detection plan for Detectron2's own tools: a YAML file, and the trunk as ``.pkl`` beside it.

    Raises:
        UserError: If a file stands there and ``force`` is not given.
        ConfigError: If the recipe is not one of detection, or Detectron2 cannot do it or does not import.
    """
    if not isinstance(plan.recipe, DetectRecipe):
        raise ConfigError(f"protocol {plan.recipe.protocol}: only detection has a Detectron2 config")
    from mixmask.transfer.detection.engines.detectron2_config import dump_config

    assert isinstance(plan.test, DetectionSet)
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: Detectron2's configs end in .yaml")
    weights = file.with_suffix(".pkl")
    for path in (file, weights):
        require_output_file(path, force)
    recipe = plan.recipe
    trunk = plan.source.info.recipe
    dump_config(recipe, trunk, plan.test, recipe.precision, recipe.seed, weights.resolve(), file)
    num = write_detectron2(weights, plan.source.state)
    return f"{file}: Detectron2 config\n{weights}: {num} tensors of the trunk, its MODEL.WEIGHTS"


def show_detections(folder: Path, out: Path, num: int, least_score: float) -> str:
    """Draw what a finished detection run found; see `transfer.detection.results.show`.

    Raises:
        UserError: If the folder is not that of a finished detection run.
    """
    directory = RunDirectory(folder)
    if not directory.recipe_file.is_file():
        raise RunDirectoryError(f"{folder}: no run directory (no recipe.yaml in it)")
    recipe = load_transfer_recipe(directory.recipe_file)
    if not isinstance(recipe, DetectRecipe):
        raise RunDirectoryError(f"{folder}: a run of {recipe.protocol}, not of detection")
    if not directory.is_finished:
        raise RunDirectoryError(f"{folder}: not finished; the command that started it resumes it")
    return draw(recipe, recipe.name, folder, out, num, least_score)
