"""MixMask on top of Un-Mix, the paper's MixMask∗ (arXiv:2210.11456, section 3.4)."""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.records import Method
from mixmask.pretrain.mask_options import MaskOptions
from mixmask.pretrain.mixture import Draw, random_permutation, reverse_permutation
from mixmask.pretrain.mixtures.unmix import draw_unmix


class MixMaskUnMix(MaskOptions):
    """MixMask on top of Un-Mix, the paper's MixMask∗. The loss is L(q, k), two terms for Un-Mix and two for MixMask.

    Un-Mix's partners are the batch in reverse order. MixMask takes a random permutation (``permutation: different``),
    or the reverse order as well (``same``, the ablation of table 2).
    """

    kind: Literal["mixmask+unmix"] = "mixmask+unmix"
    mask: Literal["block", "discrete"] = "block"
    switch: bool = True
    unmix_prob: float = Field(0.5, ge=0, le=1)
    permutation: Literal["different", "same"] = "different"

    @property
    @override
    def method(self) -> Method:
        return "mixmask+unmix"

    @property
    @override
    def num_mixtures(self) -> int:
        return 2

    @override
    def draw_group(self, num: int, height: int, width: int, rng: random.Random) -> dict[str, Draw]:
        unmix = draw_unmix(self.unmix_prob, num, height, width, rng)
        mask, lam = self.draw_masks(self.mask, num, height, width, rng)
        perm = reverse_permutation(num) if self.permutation == "same" else random_permutation(num, rng)
        return {"unmix": unmix, "mixmask": Draw(perm, lam, mask, self.switch, "MixMask")}
