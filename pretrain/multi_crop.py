"""Multi-crop (SwAV, arXiv:2006.09882, section 3.2): small views beside the two full ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.augment import AugmentRecipe
from mixmask.pretrain.framework import FrameworkRecipe


class MultiCropRecipe(FrameworkRecipe):
    """``num_small`` views of ``small_crop`` pixels, which show a share of the image in ``small_scale``.

    Their photometric augmentation is that of the first view; ``small_blur_probability`` may differ (null: it does not).
    """

    num_small: int = Field(6, ge=0, le=20)
    small_crop: int = Field(96, ge=8, le=4096)
    small_scale: tuple[float, float] = (0.05, 0.14)
    small_blur_probability: float | None = Field(None, ge=0, le=1)

    @field_validator("small_scale")
    @classmethod
    def _small_scale(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"small_scale must satisfy 0 < low <= high <= 1, got {list(scale)}")
        return scale

    @override
    def small_views(self, augment: AugmentRecipe) -> list[AugmentRecipe]:
        changed: dict[str, object] = {"crop": self.small_crop, "scale": self.small_scale, "solarize_probability": 0.0}
        if self.small_blur_probability is not None:
            changed["blur_probability"] = self.small_blur_probability
        return [augment.model_copy(update=changed)] * self.num_small


def of_each_view(trunk: nn.Module, head: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """The (N, dim) embeddings of each of the (N, 3, ·, ·) views.

    As in the published code, neighbouring views of one size pass the trunk together, and all pass the head together, so
    they share batch statistics.
    """
    features = [
        trunk(torch.cat(list(same)).contiguous(memory_format=torch.channels_last))
        for _, same in itertools.groupby(views, key=lambda view: view.shape[-1])
    ]
    return list(torch.split(head(torch.cat(features)).float(), [len(view) for view in views]))
