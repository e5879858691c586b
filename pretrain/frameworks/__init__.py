"""The frameworks, one per folder (whose ``network`` builds it) or module: each is found, and its ``kind`` is valid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixmask.engine.registry import Registry, literal_of, one_of
from mixmask.pretrain.framework import FrameworkRecipe

FRAMEWORKS: Registry[FrameworkRecipe] = Registry(
    FrameworkRecipe, __name__, "mixmask.frameworks", "framework", literal_of("kind")
)

if TYPE_CHECKING:
    AnyFramework = FrameworkRecipe
else:
    AnyFramework = one_of(FRAMEWORKS)
