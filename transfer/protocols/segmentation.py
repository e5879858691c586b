"""Semantic segmentation: an FCN, finetuned from the trunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.batch_statistics import synchronise_batchnorm
from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.distributed import from_first, on_rank0, world
from mixmask.engine.errors import DataError
from mixmask.engine.flops import forward_flops, num_parameters
from mixmask.engine.job import Job, Part
from mixmask.engine.late import torch
from mixmask.engine.normalization import normalize
from mixmask.engine.predictions import PIXELS
from mixmask.engine.randomness import derived_seed
from mixmask.engine.training import train
from mixmask.engine.workload import Workload
from mixmask.transfer.checkpoints.source import Source
from mixmask.transfer.protocol import (
    Setting,
    TransferRecipe,
    beyond_end,
    require_imagenet_statistics,
    require_shares,
)
from mixmask.transfer.segmentation.dataset import IGNORED, SegmentationSet
from mixmask.transfer.segmentation.kinds import open_segmentation
from mixmask.transfer.segmentation.recipe import SegmentationTraining

if TYPE_CHECKING:
    from torch import Tensor

    from mixmask.transfer.segmentation.network import FCN


class SegmentRecipe(SegmentationTraining, TransferRecipe):
    """An FCN on the dilated trunk, finetuned end to end; mean intersection over union (mIoU) on the test images.

    The defaults are those of mmsegmentation's ``fcn_r50-d8``, with which mmselfsup and DenseCL measure.
    """

    task: ClassVar[str] = "image-segmentation"

    protocol: Literal["segment"]

    @property
    @override
    def title(self) -> str:
        return "segmentation"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        return {"mIoU": "mIoU", "pixel_accuracy": "pixel accuracy"}

    @override
    def settings(self, train: SegmentationSet) -> dict[str, Any]:
        return {
            "iterations": self.iterations,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "crop": self.augment.crop,
            "output_stride": self.output_stride,
            "num_train": len(train),
        }

    @override
    def remarks(self) -> list[str]:
        return beyond_end(self.milestones, self.iterations, "iterations") if self.schedule == "step" else []

    @override
    def check(self, source: Source, device: torch.device) -> None:
        from mixmask.transfer.segmentation.network import check_backbone

        require_imagenet_statistics(self, source, "segmentation")
        check_backbone(source.info.recipe, self.output_stride)
        self.check_processes(world().size)

    @override
    def check_processes(self, processes: int) -> None:
        require_shares(self.batch_size, processes)

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[SegmentationSet, SegmentationSet]:
        train, test = open_segmentation(self.data)
        if len(train) < self.batch_size:
            raise DataError(
                f"{train.root}: {len(train)} training images, and batch_size is {self.batch_size}; choose at most as many"
            )
        return train, test

    @override
    def workload(self, backbone: BackboneRecipe, train: SegmentationSet, test: SegmentationSet) -> Workload:
        seen, crop = self.iterations * self.batch_size, self.augment.crop
        # Where stages keep a larger map instead of halving it, a ResNet-50 does so many times its work.
        each = {8: 5.0, 16: 1.6}.get(self.output_stride, 1.0) * forward_flops(backbone, crop)
        return Workload(
            trained=seen * each,
            forward=len(test) * each,
            side=crop,
            loaded=seen + len(test),
            steps=self.iterations,
            parameters=num_parameters(backbone),
            half=self.precision != "fp32",
            kind="segment",
        )

    def measure(self, setting: Setting[SegmentationSet]) -> dict[str, float]:
        """mIoU, accuracies and the IoU of every class, in percent."""
        from mixmask.transfer.segmentation.batches import training_batches
        from mixmask.transfer.segmentation.evaluation import evaluate, metrics_of
        from mixmask.transfer.segmentation.network import FCN

        torch.manual_seed(derived_seed(self.seed, "segmentation-head"))
        network = FCN(
            setting.source.info.recipe,
            setting.source.state,
            len(setting.train.classes),
            output_stride=self.output_stride,
            align_corners=self.align_corners,
            head=self.head,
            auxiliary=self.auxiliary,
        )
        network.to(setting.device).to(memory_format=torch.channels_last)
        synchronise_batchnorm(network, setting.device)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        job = Job(
            title=self.name,
            run=setting.run,
            fingerprint=setting.fingerprint,
            data=setting.data,
            model=network,
            optimizer=optimizer,
            schedule=self.factor,
            num_steps=self.iterations,
            images_per_step=self.batch_size,
            device=setting.device,
            seed=self.seed,
            precision=self.precision,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
        )

        def batches(first: int) -> Iterator[list[Tensor]]:
            return training_batches(setting.train, self, self.seed, first)

        def losses(batch: list[Tensor], step: int) -> list[Part]:
            return [lambda: self.losses(network, *(one.to(setting.device, non_blocking=True) for one in batch))]

        result = train(job, batches, losses)
        counts = evaluate(network, setting.test, self, setting.device, self.precision, self.name)
        metrics = from_first(metrics_of(counts, setting.test.classes) if world().is_writer else {})
        if self.save_predictions:
            on_rank0(lambda: counts.write(setting.run.path / PIXELS))
        return {**metrics, **result}

    def losses(self, network: FCN, pixels: Tensor, labels: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the head, and of the auxiliary head with its weight.

        Args:
            network: In training mode.
            pixels: (N, 3, H, W) uint8.
            labels: (N, H, W) uint8, classes or `IGNORED`.
            real: (N, H, W) bool, False where a crop is padded: there the normalised image is 0.
        """
        images = (normalize(pixels) * real[:, None]).contiguous(memory_format=torch.channels_last)
        logits, auxiliary = network(images)
        wanted = labels.long()

        def entropy(logits: Tensor) -> Tensor:
            total = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
            return total / (wanted.numel() if self.ignored_in_mean else (wanted != IGNORED).sum().clamp(min=1))

        loss = entropy(logits)
        if auxiliary is None or self.auxiliary is None:
            return {"loss": loss}
        second = entropy(auxiliary)
        return {"loss": loss + self.auxiliary.weight * second, "auxiliary": second.detach()}
