"""MoCo v1 and v2 (arXiv:1911.05722, arXiv:2003.04297)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.config import added
from mixmask.engine.wording import nearest_multiples
from mixmask.pretrain.framework import MAX_WIDTH, FrameworkRecipe

if TYPE_CHECKING:
    from mixmask.pretrain.network import Framework


class MomentumContrastRecipe(FrameworkRecipe):
    """The options of momentum contrast with a queue.

    ``bn_splits`` is the number of groups per batch with BatchNorm statistics of their own (1 on one device: ordinary
    BatchNorm). With P processes each uses bn_splits / P groups, so results are the same for every P <= bn_splits; with
    more processes, each rank is one group.

    ``symmetric``: each view is the query once and the key once, and the two losses are added. A mixture of the first
    view is compared with both keys, and the keys of both views enter the queue. Un-Mix's published CIFAR code trains
    MoCo this way (arXiv:2003.05438).
    """

    shuffles_batches: ClassVar[bool] = True

    dim: int = Field(128, ge=1, le=MAX_WIDTH)
    queue_size: int = Field(65536, ge=1, le=2**24)
    momentum: float = Field(0.999, ge=0, lt=1)
    temperature: float = Field(0.2, gt=0)
    bn_splits: int = Field(8, ge=1, le=4096)
    symmetric: bool = added(False)

    @override
    def full_passes(self, hidden: bool) -> tuple[int, int]:
        return (2, 2) if self.symmetric else (1, 1)

    @override
    def remarks(self, num_images: int) -> list[str]:
        if self.queue_size <= num_images:
            return []
        return [
            f"framework.queue_size {self.queue_size:,} is more than the {num_images:,} training images: keys of the "
            f"same image then serve as its negatives. Published recipes take a twelfth of the images or fewer"
        ]

    @override
    def elastic(self, processes: int) -> bool:
        return self.bn_splits % processes == 0

    @override
    def check_batch(self, batch_size: int, accumulate: int, processes: int) -> None:
        keys = batch_size * (2 if self.symmetric else 1)
        if self.queue_size % keys:
            what = f"the {keys} keys of a step (batch_size {batch_size}, symmetric)" if self.symmetric else ""
            raise ValueError(
                f"framework.queue_size {self.queue_size} is not a multiple of {what or f'batch_size {batch_size}'}; "
                f"{nearest_multiples(self.queue_size, keys)}"
            )
        splits = self.bn_splits
        if splits % processes and processes % splits:
            raise ValueError(f"framework.bn_splits {splits} groups cannot be shared by {processes} processes")
        groups, parts = max(splits // processes, 1), accumulate * processes
        each, rest = divmod(batch_size // parts, groups)
        if rest:
            raise ValueError(
                f"a part of {batch_size // parts} images (batch_size {batch_size} in {parts} parts) cannot be split in "
                f"{groups} equal groups of framework.bn_splits {splits}"
            )
        if each < 2:
            raise ValueError(
                f"framework.bn_splits {splits} leaves {each} image per group of batch_size {batch_size} in {parts} "
                f"part{'s' * (parts > 1)}; batch normalisation needs at least 2"
            )


class MoCoRecipe(MomentumContrastRecipe):
    """Momentum contrast: ``moco`` has a linear head, ``mocov2`` a two-layer one of the trunk's width."""

    kind: Literal["mocov2", "moco"] = "mocov2"

    @override
    def build(self, backbone: BackboneRecipe) -> Framework:
        from mixmask.pretrain.frameworks.moco.network import MoCo

        return MoCo(self, backbone)
