"""Un-Mix (arXiv:2003.05438)."""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.late import torch
from mixmask.engine.records import Method
from mixmask.pretrain.mixture import Draw, Groups, reverse_permutation


class UnMix(Groups):
    """Mixup with probability ``unmix_prob``, else CutMix; one draw per batch or group (arXiv:2003.05438, section 3)."""

    kind: Literal["unmix"] = "unmix"
    unmix_prob: float = Field(0.5, ge=0, le=1)

    @property
    @override
    def method(self) -> Method:
        return "unmix"

    @override
    def draw_group(self, num: int, height: int, width: int, rng: random.Random) -> dict[str, Draw]:
        return {"unmix": draw_unmix(self.unmix_prob, num, height, width, rng)}


def draw_unmix(probability: float, num: int, height: int, width: int, rng: random.Random) -> Draw:
    """Draw Mixup with this probability, else CutMix, for ``num`` images with partners in reverse order."""
    keep = rng.random()  # Beta(1, 1) is the uniform distribution
    perm = reverse_permutation(num)
    if rng.random() < probability:
        return Draw(perm, torch.tensor([keep], dtype=torch.float64), title="Un-Mix")
    centre = rng.randrange(height), rng.randrange(width)
    # The box may be clipped at the border, so λ becomes the area that is really kept.
    top, bottom, left, right, keep = cut_box(height, width, keep, *centre)
    mask = torch.ones(1, 1, height, width, dtype=torch.bool)
    mask[:, :, top:bottom, left:right] = False
    return Draw(perm, torch.tensor([keep]), mask, title="Un-Mix")


def cut_box(height: int, width: int, keep: float, centre_y: int, centre_x: int) -> tuple[int, int, int, int, float]:
    """CutMix's box as Un-Mix cuts it: sides √(1 - keep) of the image's, clipped at its border.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        keep: Share of the image that the unclipped box leaves, in [0, 1].
        centre_y: Row of the centre, in [0, height).
        centre_x: Column of the centre, in [0, width).

    Returns:
        Top, bottom, left, right (exclusive), and the share of the image outside the clipped box.
    """
    side = (1 - keep) ** 0.5
    cut_height, cut_width = int(height * side), int(width * side)
    top, bottom = max(centre_y - cut_height // 2, 0), min(centre_y + cut_height // 2, height)
    left, right = max(centre_x - cut_width // 2, 0), min(centre_x + cut_width // 2, width)
    return top, bottom, left, right, 1 - (bottom - top) * (right - left) / (height * width)
