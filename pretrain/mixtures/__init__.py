"""The mixtures, one per module. A module in this folder is found by itself, and its ``kind`` is valid in configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixmask.engine.registry import Registry, literal_of, one_of
from mixmask.pretrain.mixture import MixtureRecipe

MIXTURES: Registry[MixtureRecipe] = Registry(MixtureRecipe, __name__, "mixmask.mixtures", "mixture", literal_of("kind"))

if TYPE_CHECKING:
    AnyMixture = MixtureRecipe
else:
    AnyMixture = one_of(MIXTURES)
