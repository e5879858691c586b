"""What a detection engine cannot do, found before anything is read or trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from mixmask.engine import distributed
from mixmask.engine.backbones import TIMM, BackboneRecipe
from mixmask.engine.errors import ConfigError
from mixmask.engine.late import torch
from mixmask.engine.precision import Precision
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.protocol import require_shares


def check_engine(recipe: DetectRecipe, backbone: BackboneRecipe, device: torch.device, precision: Precision) -> None:
    """Refuse what the recipe's engine cannot do, before anything is read or written.

    Raises:
        ConfigError: If the engine cannot be imported, the trunk does not fit, or the world size does not divide the
            batch size.
    """
    recipe.detector.check_backbone(backbone)
    require_shares(recipe.batch_size, distributed.world().size)
    if recipe.save_detector and backbone.arch.startswith(TIMM):
        raise ConfigError(
            f"save_detector: the file has Detectron2's names, which {backbone.arch} has not; leave it false"
        )
    if recipe.engine == "detectron2":
        from mixmask.transfer.detection.engines.detectron2_config import check_recipe

        check_recipe(recipe, backbone, device, precision)


def check_annotations(recipe: DetectRecipe, classes: Sequence[str]) -> None:
    """Refuse annotations that the recipe's engine could not evaluate after training.

    The check uses Detectron2's own readers. A machine without it, such as one that only submits jobs, skips the check;
    on the machine that runs, `check_engine` makes sure that Detectron2 is there.

    Raises:
        ConfigError: The message names the data folder and the split.
    """
    if recipe.engine == "detectron2" and importlib.util.find_spec("detectron2") is not None:
        from mixmask.transfer.detection.engines import detectron2_config

        detectron2_config.check_annotations(recipe, classes)
