"""MixMask (arXiv:2210.11456, section 3, equations 1-6)."""

from __future__ import annotations

import random
from typing import Literal

from typing_extensions import override

from mixmask.engine.records import Method
from mixmask.pretrain.mask_options import MaskOptions
from mixmask.pretrain.mixture import Draw, random_permutation, reverse_permutation


class MixMask(MaskOptions):
    """Fill the masked area of an image with another image (section 3.1).

    ``switch: false`` drops the loss of the switch image and ``mask: discrete`` sets each cell independently (ablations
    of table 1). ``partner: random`` takes a random permutation instead of the reverse order.
    """

    kind: Literal["mixmask"] = "mixmask"
    mask: Literal["block", "discrete"] = "block"
    switch: bool = True
    partner: Literal["reverse", "random"] = "reverse"

    @property
    @override
    def method(self) -> Method:
        return "mixmask"

    @override
    def draw_group(self, num: int, height: int, width: int, rng: random.Random) -> dict[str, Draw]:
        mask, lam = self.draw_masks(self.mask, num, height, width, rng)
        perm = reverse_permutation(num) if self.partner == "reverse" else random_permutation(num, rng)
        return {"mixmask": Draw(perm, lam, mask, self.switch, "MixMask")}
