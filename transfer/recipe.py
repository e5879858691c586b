"""The typed recipes of the transfer protocols."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from engine.augment import CropRecipe, Normalization
from engine.config import Recipe, added, load_recipe, operational, read_protocol
from engine.datasets import DataRecipe
from engine.expected import Expectations
from engine.precision import DeviceName, Precision
from engine.records import Label, Method
from transfer.detection.recipe import DetectRecipe

Epoch = Annotated[int, Field(ge=1, le=10**6)]


def beyond_end(milestones: Sequence[int], length: float, unit: str) -> list[str]:
    """A sentence if milestones of a schedule lie at or after its end."""
    late = [milestone for milestone in milestones if milestone >= length]
    if not late:
        return []
    return [
        f"milestones {', '.join(map(str, late))} are not reached in {length:g} {unit}: the learning rate is not reduced "
        f"there"
    ]


LABELS = ("framework", "method", "pretrain_epochs", "pretrain_data")  # what a user may say of a foreign checkpoint


class TransferBase(Recipe):
    """What every transfer recipe has.

    ``backbone`` is a file: this project's ``backbone.safetensors`` or a checkpoint of a known layout. ``framework``,
    ``method``, ``pretrain_epochs`` and ``pretrain_data`` label the result when the file cannot say (a foreign checkpoint):
    any names, shown in tables as they are given. ``normalization`` names the data set whose
    mean and deviation the trunk was trained with; null takes what the file says, and ImageNet's where it does not.
    """

    name: str = operational(..., pattern=r"^[A-Za-z0-9_.+-]+$")
    seed: int = Field(0, ge=0)
    backbone: str = operational(..., min_length=1)
    framework: Label | None = operational(None)
    method: Method | None = operational(None)
    pretrain_epochs: float | None = operational(None, gt=0, le=1e9, allow_inf_nan=False)
    pretrain_data: Label | None = operational(None)
    normalization: Normalization | None = added(None)
    precision: Precision = "fp32"
    device: DeviceName = operational("auto")
    expected: Expectations = operational(())
    log_every: int = operational(10, ge=1)
    checkpoint_every: int = operational(500, ge=1)

    def remarks(self) -> list[str]:
        """What is odd about the recipe and no error, one sentence each."""
        steps = getattr(self, "shape", "step") == "step" and getattr(self, "final_lr", None) is None
        length, unit = getattr(self, "iterations", None), "iterations"
        if length is None:
            length, unit = getattr(self, "epochs", None), "epochs"
        if length is None or not steps:
            return []
        return beyond_end(getattr(self, "milestones", ()), length, unit)


class EvaluationRecipe(Recipe):
    """Test-time view: short side to ``resize`` pixels (null leaves the image), then the central ``crop``."""

    resize: int | None = Field(256, ge=8, le=8192)
    crop: int = Field(224, ge=8, le=8192)
    batch_size: int = operational(256, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> EvaluationRecipe:
        if self.resize is not None and self.resize < self.crop:
            raise ValueError(f"resize {self.resize} is smaller than crop {self.crop}")
        return self


class ClassifyBase(TransferBase):
    """What the classification recipes share. ``save_predictions`` keeps every test image's answer for comparisons."""

    save_predictions: bool = operational(True)


class KnnRecipe(ClassifyBase):
    """kNN on L2-normalised features, votes weighted with exp(similarity / temperature).

    ``features: trunk`` takes the trunk's output, ``head`` that of the projection head, which files of this project's own
    pretraining hold: the MoCo CIFAR demo and Un-Mix's code take the 128-d head.
    """

    protocol: Literal["knn"]
    data: DataRecipe
    evaluation: EvaluationRecipe = EvaluationRecipe()
    k: int = Field(200, ge=1)
    temperature: float = Field(0.1, gt=0, le=1e6)
    features: Literal["trunk", "head"] = added("trunk")


class ProbeOptimizer(Recipe):
    """Which optimizer trains a probe; ``adam`` has no use for ``momentum``."""

    kind: Literal["sgd", "adam"] = "sgd"


class LinearRecipe(ClassifyBase):
    """A linear classifier on the frozen trunk (protocols of MoCo, ``main_lincls.py``): SGD, rate 30, ×0.1 at 60 and 80.

    ``augment: null`` trains on fixed features: every image's test-time view goes through the trunk once. With
    ``schedule: exponential`` the rate falls from ``lr`` to ``final_lr``, by the same factor every epoch. W-MSE's probe
    (arXiv:2007.06346, `htdt/self-supervised` ``eval/sgd.py``) is that with Adam: ``cifar100_linear_wmse.yaml``.
    """

    protocol: Literal["linear"]
    data: DataRecipe
    augment: CropRecipe | None = CropRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    optimizer: ProbeOptimizer = added(ProbeOptimizer())
    schedule: Literal["step", "exponential"] = added("step")
    final_lr: float | None = added(None, gt=0, le=1e6)
    lr: float = Field(30.0, gt=0, le=1e30)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, le=1e6)
    batch_size: int = Field(256, ge=2, le=2**22)
    epochs: int = Field(100, ge=1, le=10**6)
    milestones: tuple[Epoch, ...] = (60, 80)
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _final_rate(self) -> LinearRecipe:
        if (self.schedule == "exponential") != (self.final_lr is not None):
            raise ValueError("schedule: exponential and final_lr go together: set both, or neither")
        return self


Preset = Literal["paper_table", "paper_text", "swav", "barlow"]

# (lr of the trunk, lr of the classifier) per percentage of labels
PRESETS: dict[str, dict[float, tuple[float, float]]] = {
    "paper_table": {
        1: (0.002, 0.5),
        10: (0.002, 0.5),
        100: (0.001, 0.05),
    },  # MixMask, supplement, finetuning table
    "paper_text": {1: (0.002, 0.5), 10: (0.001, 0.5), 100: (0.001, 0.5)},  # MixMask, section 4.4
    "swav": {1: (0.02, 5.0), 10: (0.01, 0.2)},  # arXiv:2006.09882, code
    "barlow": {1: (0.005, 0.5), 10: (0.005, 0.5)},  # arXiv:2103.03230, code
}


SYNCHRONISED = ("swav",)  # presets whose own code synchronises batch statistics: SwAV's eval_semisup.py


class SemisupRecipe(ClassifyBase):
    """Finetuning everything on a share of the labels: SGD, 20 epochs, two learning rates (MixMask, section 4.4).

    ``preset`` names a published pair of rates for 1, 10 and 100 % of labels; ``lr_trunk`` and ``lr_head`` replace them.
    ``schedule`` is the preset's by default: cosine for ``barlow``, steps for the others. ``label_list`` names the
    labelled images (SimCLR's lists) where ``labels`` would draw a class-balanced subset. ``sync_bn`` takes batch statistics
    over all processes (GPUs only): by default where the preset's own code does, which is SwAV's.
    """

    protocol: Literal["semisup"]
    data: DataRecipe
    augment: CropRecipe = CropRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    labels: float = Field(gt=0, le=100)
    label_list: str | None = operational(None)
    subset_seed: int = Field(0, ge=0)
    preset: Preset = "paper_table"
    lr_trunk: float | None = Field(None, ge=0, le=1e6)
    lr_head: float | None = Field(None, gt=0, le=1e6)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, le=1e6)
    batch_size: int = Field(256, ge=2, le=2**22)
    epochs: int = Field(20, ge=1, le=10**6)
    sync_bn: bool = added(False)
    schedule: Literal["step", "cosine"] | None = None
    milestones: tuple[Epoch, ...] = (12, 16)
    gamma: float = Field(0.2, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _as_the_preset_has_it(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") in SYNCHRONISED:
            return {"sync_bn": True, **given}
        return given

    @model_validator(mode="after")
    def _has_rates(self) -> SemisupRecipe:
        if (self.lr_trunk is None or self.lr_head is None) and self.labels not in PRESETS[self.preset]:
            known = ", ".join(f"{share:g}" for share in PRESETS[self.preset])
            raise ValueError(
                f"preset '{self.preset}' has learning rates for {known} % of labels, not for {self.labels:g}; "
                f"set lr_trunk and lr_head"
            )
        return self

    @property
    def shape(self) -> Literal["step", "cosine"]:
        """The schedule in force."""
        return self.schedule or ("cosine" if self.preset == "barlow" else "step")

    @property
    def rates(self) -> tuple[float, float]:
        """(trunk, classifier)."""
        preset = PRESETS[self.preset].get(self.labels, (0.0, 0.0))
        return (
            preset[0] if self.lr_trunk is None else self.lr_trunk,
            preset[1] if self.lr_head is None else self.lr_head,
        )


class DetectTransferRecipe(DetectRecipe, TransferBase):
    """Faster R-CNN on VOC or Mask R-CNN on COCO, finetuned from the trunk."""


TransferRecipe = KnnRecipe | LinearRecipe | SemisupRecipe | DetectTransferRecipe

PROTOCOLS: dict[str, type[TransferBase]] = {
    "knn": KnnRecipe,
    "linear": LinearRecipe,
    "semisup": SemisupRecipe,
    "detect_voc": DetectTransferRecipe,
    "detect_coco": DetectTransferRecipe,
}


def load_transfer_recipe(
    path: Path | str, overrides: Sequence[str] = (), origin: str = "command line"
) -> TransferRecipe:
    """Read a transfer config; its ``protocol`` decides what else it may say.

    Raises:
        ConfigError: As `load_recipe`; also when the protocol is missing or unknown.
    """
    protocol = read_protocol(path, overrides, tuple(PROTOCOLS))
    recipe = load_recipe(PROTOCOLS[protocol], path, overrides, origin)
    assert isinstance(recipe, KnnRecipe | LinearRecipe | SemisupRecipe | DetectTransferRecipe)
    return recipe
