"""Pretrain ConvNets without labels and measure how well they transfer.

    import mixmask

    model = mixmask.load_backbone("moco_v2_800ep_pretrain.pth.tar")     # anyone's checkpoint; or any nn.Module of yours
    mixmask.knn(model, "photos/")                                       # top-1 in percent

Networks:
    load_backbone       the trunk of a checkpoint, of this project or any other
    convert             write it for Detectron2, torchvision or timm
    knn, linear_probe   top-1 in percent of any network
    extract_features    features, labels and paths of a folder of images

Studies, as the command line does them:
    pretrain            a recipe in, a backbone out
    transfer            a recipe and a backbone in, a record out
    results             every finished run as a table
    compare             two methods, with intervals and tests

MixMask in your own loop:
    MixMask, UnMix, MixMaskUnMix    the kinds of mixture, with their options
    draw_mixtures, mixture_loss     the mixed images of a batch, and the loss of a mixed query (a `Mixture` has its weights)

`UserError` is a mistake in what you gave (an option that `MixMask` does not take is pydantic's `ValidationError`),
`RunFailure` a run that cannot continue. `help(mixmask.knn)` and so on give the details. What
is named here is promised to stay; everything else is internal.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixmask.api.backbones import convert, load_backbone
    from mixmask.api.evaluation import Features, extract_features, knn, linear_probe
    from mixmask.api.tables import compare, results
    from mixmask.engine.errors import RunFailure, UserError
    from mixmask.pretrain.mixture import Mixture, draw_mixtures, mixture_loss
    from mixmask.pretrain.mixtures.mixmask import MixMask
    from mixmask.pretrain.mixtures.mixmask_unmix import MixMaskUnMix
    from mixmask.pretrain.mixtures.unmix import UnMix

_HOMES = {
    "Features": "api.evaluation",
    "compare": "api.tables",
    "convert": "api.backbones",
    "extract_features": "api.evaluation",
    "knn": "api.evaluation",
    "linear_probe": "api.evaluation",
    "load_backbone": "api.backbones",
    "results": "api.tables",
    "RunFailure": "engine.errors",
    "UserError": "engine.errors",
    "Mixture": "pretrain.mixture",
    "draw_mixtures": "pretrain.mixture",
    "mixture_loss": "pretrain.mixture",
    "MixMask": "pretrain.mixtures.mixmask",
    "MixMaskUnMix": "pretrain.mixtures.mixmask_unmix",
    "UnMix": "pretrain.mixtures.unmix",
}
_STAGES = ("pretrain", "transfer")  # packages that are also functions of the API

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


# Names are imported when they are first used, so that ``import mixmask`` does not load torch.
def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return importlib.import_module(f"mixmask.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mixmask' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"mixmask.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Stage(ModuleType):
    """A package that can be called: ``mixmask.pretrain(recipe)`` runs `mixmask.api.stages.pretrain`."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function(*arguments, **named)

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module("mixmask.api.stages"), self.__name__.removeprefix("mixmask."))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets this attribute when the package is first imported, by whatever code.
        if name in _STAGES and isinstance(value, ModuleType):
            value.__class__ = _Stage
        super().__setattr__(name, value)


# A module can define __getattr__, but not __setattr__: that takes a class.
sys.modules[__name__].__class__ = _Package
