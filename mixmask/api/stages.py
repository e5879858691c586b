"""The stages of a study: what the commands ``pretrain`` and ``transfer`` do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mixmask.api import Place
from mixmask.engine.builtin_configs import config_file
from mixmask.engine.config import load_recipe
from mixmask.engine.errors import ConfigError
from mixmask.engine.records import Record
from mixmask.pretrain import stage as pretrain_stage
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.transfer import stage as transfer_stage
from mixmask.transfer.protocol import TransferRecipe
from mixmask.transfer.recipe import load_transfer_recipe

Overrides = Mapping[str, Any] | Sequence[str]


def pretrain(
    recipe: Place | PretrainRecipe, overrides: Overrides = (), *, runs: Place = "runs", run_dir: Place | None = None
) -> Path:
    """Pretrain a backbone, as ``mixmask pretrain`` does; a finished run is returned as it is.

    Args:
        recipe: The name of a config, a YAML file, or a recipe.
        overrides: Values that replace those of the config, with dotted keys: ``{"mix.grid": 4}``, or strings as on the
            command line: ``["mix.grid=4"]``.
        runs: Folder of all runs.
        run_dir: The run's directory; by default named by the recipe's fingerprint.

    Returns:
        The path of ``backbone.safetensors``.

    Raises:
        UserError: If the recipe, the data or the directory is invalid.
        RunFailure: If the run cannot continue.

    >>> small = {"max_steps": 1, "batch_size": 8, "framework.queue_size": 8, "framework.bn_splits": 1, "monitor": None}
    >>> where = {"data.root": photos, "augment.crop": 32, "warmup_epochs": 0}
    >>> mixmask.pretrain(demo / "pretrain.yaml", {**small, **where}, runs=folder).name
    'backbone.safetensors'
    """
    if isinstance(recipe, PretrainRecipe):
        _require_none(overrides)
    else:
        recipe = load_recipe(PretrainRecipe, config_file(Path(recipe), "pretrain"), _texts(overrides), "overrides")
    return pretrain_stage.run(pretrain_stage.plan(recipe, Path(runs), None if run_dir is None else Path(run_dir)))


def transfer(
    recipe: Place | TransferRecipe, overrides: Overrides = (), *, runs: Place = "runs", run_dir: Place | None = None
) -> Record:
    """Measure how well a backbone transfers, as ``mixmask transfer`` does; a finished run is returned as it is.

    Args:
        recipe: The name of a config, a YAML file, or a recipe.
        overrides: As `pretrain` takes them; ``backbone`` and ``data.root`` are needed.
        runs: Folder of all runs.
        run_dir: The run's directory; by default named by the recipe's fingerprint.

    Returns:
        The record; ``record.metrics`` are in percent.

    >>> where = [f"backbone={backbone}", f"data.root={photos}", "evaluation.crop=32", "k=5"]
    >>> sorted(mixmask.transfer(demo / "knn.yaml", where, runs=folder).headlines)
    ['knn/top1']
    """
    if isinstance(recipe, TransferRecipe):
        _require_none(overrides)
    else:
        recipe = load_transfer_recipe(config_file(Path(recipe), "transfer"), _texts(overrides), "overrides")
    return transfer_stage.run(transfer_stage.plan(recipe, Path(runs), None if run_dir is None else Path(run_dir)))


def _texts(overrides: Overrides) -> list[str]:
    """The overrides as ``key=value`` strings."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides: {overrides!r} is one text; give a mapping, {{'epochs': 10}}, or a list of texts")
    if isinstance(overrides, Mapping):
        network = next((key for key, value in overrides.items() if isinstance(value, nn.Module)), None)
        if network is not None:
            raise ConfigError(f"{network}: a file was expected; mixmask.knn and linear_probe take networks in memory")
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]  # JSON is YAML
    texts = [*overrides]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"overrides: texts such as 'epochs=10' were expected, got {texts!r}")
    return texts


def _require_none(overrides: Overrides) -> None:
    if overrides:
        raise ConfigError("overrides: are for configs; a recipe is changed with recipe.model_copy(update={…})")
