"""Faster R-CNN on VOC and Mask R-CNN on COCO, finetuned from the trunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.flops import num_parameters
from mixmask.engine.late import torch
from mixmask.engine.workload import Workload
from mixmask.transfer.checkpoints.source import Source
from mixmask.transfer.detection.checks import check_annotations, check_engine
from mixmask.transfer.detection.data.annotations import open_detection
from mixmask.transfer.detection.data.pictures import DetectionSet
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.protocol import (
    Setting,
    TransferRecipe,
    beyond_end,
    require_imagenet_statistics,
    require_shares,
)

BOXES = {"bbox/AP": "box AP", "bbox/AP50": "box AP50", "bbox/AP75": "box AP75"}
KEYPOINTS = {"keypoints/AP": "keypoint AP", "keypoints/AP50": "keypoint AP50", "keypoints/AP75": "keypoint AP75"}
MASKS = {"segm/AP": "mask AP", "segm/AP50": "mask AP50", "segm/AP75": "mask AP75"}


class DetectTransferRecipe(DetectRecipe, TransferRecipe):
    """Faster R-CNN on VOC or Mask R-CNN on COCO, finetuned from the trunk (MoCo's protocol, arXiv:1911.05722, appendix)."""

    task: ClassVar[str] = "object-detection"

    @property
    @override
    def record_name(self) -> str:
        return f"{self.protocol}{self.detector.suffix}"

    @property
    @override
    def title(self) -> str:
        return f"detection {self.detector.label}".strip()

    @property
    @override
    def num_seeds(self) -> int:
        return 1 if self.coco else 5  # MoCo's paper takes the mean of five on VOC

    @property
    @override
    def variation(self) -> str:
        return "" if self.coco else "on VOC runs differ by about 0.2 AP, 0.2 AP50, 0.4 AP75"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        every = {"bbox": BOXES, "segm": MASKS, "keypoints": KEYPOINTS}
        return {metric: title for kind in self.measures for metric, title in every[kind].items()}

    @override
    def settings(self, train: DetectionSet) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "iterations": self.scaled_length(self.iterations),
            "batch_size": self.batch_size,
            "lr": self.scaled_lr,
            "recipe_iterations": self.iterations,
            "recipe_batch_size": self.reference_batch_size or self.batch_size,
        }

    @override
    def remarks(self) -> list[str]:
        remarks = beyond_end(self.milestones, self.iterations, "iterations")
        years = {split.partition("/")[0] for split in self.data.test}
        if not self.coco and self.data.name.startswith("voc20") and self.data.name.removeprefix("voc") not in years:
            remarks.append(
                f"data.name={self.data.name} is what tables will call the test pictures, and they are "
                f"{', '.join(self.data.test)}: give data.name=voc{min(years)}"
            )
        return remarks

    @override
    def one_task_per_node(self) -> bool:
        return self.engine == "detectron2"  # its launcher starts the processes of a node

    @override
    def check(self, source: Source, device: torch.device) -> None:
        require_imagenet_statistics(self, source, "detection")
        check_engine(self, source.info.recipe, device, self.precision)

    @override
    def check_processes(self, processes: int) -> None:
        require_shares(self.batch_size, processes)

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[DetectionSet, DetectionSet]:
        train, test = open_detection(self)
        check_annotations(self, test.classes)
        return train, test

    @override
    def workload(self, backbone: BackboneRecipe, train: DetectionSet, test: DetectionSet) -> Workload:
        iterations = self.scaled_length(self.iterations)
        seen = iterations * self.batch_size
        short = round(sum(self.min_size_train) / len(self.min_size_train))
        in_training, in_tests = (
            self.detector.operations(backbone, side, side * 4 // 3, training)
            for side, training in ((short, True), (self.min_size_test, False))
        )
        return Workload(
            trained=seen * in_training,
            forward=len(test) * in_tests,
            side=short,
            loaded=seen + len(test),
            steps=iterations,
            parameters=num_parameters(backbone),
            half=self.precision != "fp32",
            kind=self.detector.kind,
        )

    def measure(self, setting: Setting[DetectionSet]) -> dict[str, float]:
        """Average precisions of boxes, on COCO of masks, too, in percent."""
        from mixmask.transfer.detection.engines.setting import DetectionSetting
        from mixmask.transfer.detection.run import run_detection

        return run_detection(
            self,
            DetectionSetting(
                run=setting.run,
                fingerprint=setting.fingerprint,
                data=setting.data,
                device=setting.device,
                precision=self.precision,
                seed=self.seed,
                title=self.name,
                log_every=self.log_every,
                checkpoint_every=self.checkpoint_every,
                backbone=setting.source.info.recipe,
                state=setting.source.state,
                train_set=setting.train,
                test_set=setting.test,
            ),
        )
