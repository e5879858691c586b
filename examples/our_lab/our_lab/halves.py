"""A mixture: the left half of an image beside the right half of another."""

from __future__ import annotations

import random
from typing import Literal

import torch
from typing_extensions import override

from mixmask.pretrain.mixture import Draw, Groups, reverse_permutation


class Halves(Groups):
    """λ is ½, or as near as the width allows."""

    kind: Literal["halves"] = "halves"

    @property
    @override
    def method(self) -> str:
        return "halves"

    @override
    def draw_group(self, num: int, height: int, width: int, rng: random.Random) -> dict[str, Draw]:
        mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
        mask[..., : width // 2] = True
        return {"halves": Draw(reverse_permutation(num), torch.tensor([(width // 2) / width]), mask, title="Halves")}
