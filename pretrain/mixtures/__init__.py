"""The mixtures, one module each; a module that is put here is found, and its recipe's ``kind`` can be used in configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from mixmask.engine.registry import Registry, literal_of
from mixmask.pretrain.mixture import MixtureRecipe

MIXTURES: Registry[MixtureRecipe] = Registry(MixtureRecipe, __name__, "mixmask.mixtures", "mixture", literal_of("kind"))

if TYPE_CHECKING:
    AnyMixture = MixtureRecipe
else:
    AnyMixture = Annotated[Union[tuple(MIXTURES.classes())], Field(discriminator="kind")]  # noqa: UP007
