"""Heavy libraries that are imported when something of them is first used.

torch takes seconds and hundreds of megabytes to import, and torchvision imports torch. Recipes, lists of images and plans
of suites need neither. Their modules take ``torch`` from here, so that `mixmask launch` starts at once; a module that
needs torch while it is imported, such as one that defines a network, imports it itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    import torchvision as torchvision
else:

    class _Late:
        """A module by its name."""

        def __init__(self, name: str) -> None:
            self.__module = name

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self.__module), name)

        def __reduce__(self) -> tuple[Any, ...]:
            return importlib.import_module, (self.__module,)

        def __repr__(self) -> str:
            return f"<{self.__module}, imported when it is used>"

    torch = _Late("torch")
    torchvision = _Late("torchvision")
