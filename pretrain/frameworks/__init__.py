"""The frameworks, one module each; a module that is put here is found, and its recipe's ``kind`` can be used in configs."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from pretrain.framework import FrameworkRecipe

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

if TYPE_CHECKING:
    AnyFramework = FrameworkRecipe
else:
    AnyFramework = Annotated[Union[tuple(FrameworkRecipe.__subclasses__())], Field(discriminator="kind")]  # noqa: UP007
