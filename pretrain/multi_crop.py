"""Multi-crop (SwAV, arXiv:2006.09882, section 3.2): small views beside the two full ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field, field_validator
from typing_extensions import override

from mixmask.engine.augment import AugmentRecipe
from mixmask.engine.late import torch
from mixmask.pretrain.framework import FrameworkRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from mixmask.pretrain.network import Encoder


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


def of_each_view(encoder: Encoder, views: Sequence[Tensor]) -> list[Tensor]:
    """The (N, dim) embeddings of each of the (N, 3, ·, ·) views.

    As in the published code, neighbouring views of one size pass the trunk together, and all pass the head together, so
    they share batch statistics.
    """
    features = [
        encoder.trunk(torch.cat(list(same)).contiguous(memory_format=torch.channels_last))
        for _, same in itertools.groupby(views, key=lambda view: view.shape[-1])
    ]
    # Under autocast the projector returns half precision, which is too coarse for the losses.
    return list(torch.split(encoder.projector(torch.cat(features)).float(), [len(view) for view in views]))


def cross_entropy(similarity: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """(N,) cross-entropies of softmax(similarity / temperature) with the wanted (N, K) distributions."""
    return -(wanted * (similarity / temperature).log_softmax(dim=1)).sum(dim=1)


def over_pairs(
    loss: Callable[[Tensor, Tensor], Tensor], predictions: Sequence[Tensor], wanted: Sequence[Tensor]
) -> Tensor:
    """(N,) mean loss over all pairs of a full view, for which something is wanted, and another view, which predicts it."""
    pairs = [(full, view) for full in range(len(wanted)) for view in range(len(predictions)) if view != full]
    return torch.stack([loss(predictions[view], wanted[full]) for full, view in pairs]).mean(dim=0)
