"""Functions that compute without gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

from mixmask.engine.late import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad` as a decorator that needs torch when the function is called, not when its module is imported.

    Each step of a generator runs without gradients; the caller's code between the steps keeps its own.
    """

    @cache
    def decorated() -> Callable[P, R]:
        return torch.no_grad()(function)

    @wraps(function)
    def guarded(*arguments: P.args, **named: P.kwargs) -> R:
        return decorated()(*arguments, **named)

    return guarded
