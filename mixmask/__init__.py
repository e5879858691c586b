"""Pretrain ConvNets without labels and measure how well they transfer.

In Python:

    import mixmask

    model = mixmask.load_backbone("moco_v2_800ep_pretrain.pth.tar")     # anyone's checkpoint; or any nn.Module of yours
    mixmask.knn(model, "photos/")                                       # top-1 in percent

`__all__` is what is promised to stay; everything else is internal. Names are imported when they are first used, so that
``import mixmask`` takes no time.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixmask.api import (
        Features,
        compare,
        convert,
        extract_features,
        knn,
        linear_probe,
        load_backbone,
        results,
    )
    from mixmask.engine.errors import RunFailure, UserError
    from mixmask.pretrain.mixture import Mixture, draw_mixtures, mixture_loss
    from mixmask.pretrain.mixtures.mixmask import MixMask
    from mixmask.pretrain.mixtures.mixmask_unmix import MixMaskUnMix
    from mixmask.pretrain.mixtures.unmix import UnMix

_HOMES = {
    "Features": "api",
    "compare": "api",
    "convert": "api",
    "extract_features": "api",
    "knn": "api",
    "linear_probe": "api",
    "load_backbone": "api",
    "results": "api",
    "RunFailure": "engine.errors",
    "UserError": "engine.errors",
    "Mixture": "pretrain.mixture",
    "draw_mixtures": "pretrain.mixture",
    "mixture_loss": "pretrain.mixture",
    "MixMask": "pretrain.mixtures.mixmask",
    "MixMaskUnMix": "pretrain.mixtures.mixmask_unmix",
    "UnMix": "pretrain.mixtures.unmix",
}
_STAGES = ("pretrain", "transfer")  # packages of whose names the API has functions, too

__all__ = [
    "Features",
    "MixMask",
    "MixMaskUnMix",
    "Mixture",
    "RunFailure",
    "UnMix",
    "UserError",
    "compare",
    "convert",
    "draw_mixtures",
    "extract_features",
    "knn",
    "linear_probe",
    "load_backbone",
    "mixture_loss",
    "pretrain",
    "results",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return importlib.import_module(f"mixmask.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mixmask' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"mixmask.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Stage(ModuleType):
    """``mixmask.pretrain(recipe)`` is `mixmask.api.pretrain`, and ``mixmask.pretrain`` a package all the same."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module("mixmask.api"), self.__name__.removeprefix("mixmask."))(
            *arguments, **named
        )


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STAGES and isinstance(
            value, ModuleType
        ):  # the import of the package sets it, whoever asks for that
            value.__class__ = _Stage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
