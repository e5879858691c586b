"""A run of seconds for every framework, and how it is broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixmask.engine.config import load_recipe
from mixmask.engine.job import Part
from mixmask.pretrain import stage
from mixmask.pretrain.recipe import PretrainRecipe

CONFIG = """
name: tiny
device: cpu
data: {name: shapes, root: ROOT, train: train, test: val, storage: stream, num_workers: 1}
backbone: {arch: resnet18, stem: standard}
framework: {kind: mocov2, dim: 16, queue_size: 64, momentum: 0.9, temperature: 0.2, bn_splits: 2}
mix: {kind: mixmask, grid: 4, ratio: 0.5}
augment: {crop: 32, scale: [0.3, 1.0]}
optimizer: {kind: sgd, lr: 0.03, weight_decay: 1e-4}
epochs: 2
batch_size: 16
log_every: 1
checkpoint_every: 3
"""


SMALL_FRAMEWORKS = {
    "moco": "framework={kind: moco, dim: 16, queue_size: 64, momentum: 0.9, bn_splits: 1}",
    "byol": "framework={kind: byol, dim: 16, projector_width: 32}",
    "simclr": "framework={kind: simclr, dim: 16, projector_width: 32}",
    "simsiam": "framework={kind: simsiam, dim: 16, projector_layers: 2}",
    "densecl": "framework={kind: densecl, dim: 16, queue_size: 64, momentum: 0.9, bn_splits: 2}",
    "mocov3": "framework={kind: mocov3, dim: 16, projector_width: 32, momentum: 0.9}",
    "barlowtwins": "framework={kind: barlowtwins, dim: 16, projector_width: 32}",
    "vicreg": "framework={kind: vicreg, dim: 16, projector_width: 32}",
    "swav": (
        "framework={kind: swav, dim: 16, projector_width: 32, prototypes: 20, num_small: 2, small_crop: 16, queue_size: 24, "
        "queue_starts: 0.1, freeze_prototypes: 0.3}"
    ),
    "dino": (
        "framework={kind: dino, dim: 16, projector_width: 32, outputs: 24, momentum: 0.9, num_small: 2, small_crop: 16, "
        "teacher_warmup: 0.5, freeze_prototypes: 0.3}"
    ),
}

BOTH = "mix={kind: mixmask+unmix, grid: 4, mask_groups: 2}"
SMALL_MIXTURES = {
    "plain": ["mix={kind: none}"],
    "masks per image": ["mix={kind: mixmask, grid: 4, mask_per: sample}"],
    "erased": ["mix={kind: erase, grid: 4, fill: noise, extra_crops: 1, extra_crop: 16}"],
}


def plan(config: Path, where: Path, *overrides: str) -> stage.PretrainPlan:
    return stage.plan(load_recipe(PretrainRecipe, config, overrides), where)


def interrupt_at(step: int, broken: stage.PretrainPlan) -> None:
    """Run a plan and break it off inside a step."""
    original = stage.batch_parts

    def failing(*args: Any, **kwargs: Any) -> list[Part]:
        if args[-1] == step:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    stage.batch_parts = failing
    try:
        with pytest.raises(KeyboardInterrupt):
            stage.run(broken)
    finally:
        stage.batch_parts = original
