"""No mixture: the framework as published."""

from __future__ import annotations

from typing import Literal

from typing_extensions import override

from mixmask.engine.records import Method
from mixmask.pretrain.mixture import MixtureRecipe


class NoMix(MixtureRecipe):
    """The framework as published: clean views only."""

    kind: Literal["none"] = "none"

    @property
    @override
    def method(self) -> Method:
        return "vanilla"
