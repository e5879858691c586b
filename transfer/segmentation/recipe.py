"""The typed recipe of semantic segmentation: an FCN on a dilated trunk (arXiv:1411.4038, 1606.00915)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mixmask.engine.config import Recipe, operational

Side = Annotated[int, Field(ge=8)]


class SegmentationData(Recipe):
    """Where the images and their label maps are.

    ``root`` is the folder of the data set, ``train`` and ``test`` are its splits. VOC: a VOCdevkit, with the splits
    ``2012/train``, ``2012/val`` and ``2012/train_aug``; the last adds SBD's label maps, from ``sbd`` or from the folder
    SegmentationClassAug. Cityscapes: the folder with leftImg8bit and gtFine, and ``train`` and ``val``. Any other data:
    ``images/SPLIT`` and ``annotations/SPLIT`` with files of the same names, and ``classes.txt``. ``layout`` says which it
    is, if that is not clear. ``allow_overlap`` permits images that are in both splits.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    root: str = operational(..., min_length=1)
    train: tuple[str, ...] = Field(min_length=1)
    test: tuple[str, ...] = Field(min_length=1)
    layout: str | None = operational(None)
    sbd: str | None = operational(None, min_length=1)
    num_workers: int = operational(4, ge=0)
    allow_overlap: bool = False


class SegmentationAugment(Recipe):
    """What is done to a training image.

    It is resized so that it fits ``resize`` (long side, short side) times a factor drawn from ``factor``, and a square of
    ``crop`` pixels is cut out; with ``most_of_one_class``, a cut with a larger share of one class is drawn again, at most
    ten times. ``jitter`` changes brightness, contrast, saturation and hue, each with probability 1/2.
    """

    resize: tuple[Side, Side]
    factor: tuple[float, float] = (0.5, 2.0)
    crop: Side
    most_of_one_class: float | None = Field(None, gt=0, le=1)
    flip: float = Field(0.5, ge=0, le=1)
    jitter: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> SegmentationAugment:
        if not 0 < self.factor[0] <= self.factor[1]:
            raise ValueError(
                f"factor: a smallest and a largest one above 0, such as [0.5, 2] (given: {list(self.factor)})"
            )
        if self.resize[0] < self.resize[1]:
            raise ValueError(f"resize: the long side, then the short one (given: {list(self.resize)})")
        return self


class SegmentationTest(Recipe):
    """How test images are seen.

    With ``resize``, an image is made to fit (long side, short side); null keeps its own size. With ``window``, squares of so
    many pixels are seen every ``stride`` pixels, and their logits averaged. Answers have the size of the label map.
    """

    resize: tuple[Side, Side] | None = None
    window: Side | None = None
    stride: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _both(self) -> SegmentationTest:
        if (self.window is None) != (self.stride is None):
            raise ValueError("window and stride go together")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ValueError(
                f"stride: at most the window, or pixels are not seen (given: {self.stride} > {self.window})"
            )
        return self


class HeadRecipe(Recipe):
    """An FCN head: 3×3 convolutions with batch normalisation and ReLU, dropout, and a 1×1 convolution.

    ``concat_input`` adds a convolution of the head's input and output side by side (mmsegmentation's FCNHead).
    """

    channels: int = Field(512, ge=1)
    num_conv: int = Field(2, ge=0)
    dilation: int = Field(1, ge=1)
    concat_input: bool = True
    dropout: float = Field(0.1, ge=0, lt=1)


class AuxiliaryRecipe(HeadRecipe):
    """A second head on the map before the last one, for training only; its loss counts ``weight``."""

    channels: int = Field(256, ge=1)
    num_conv: int = Field(1, ge=0)
    concat_input: bool = False
    weight: float = Field(0.4, ge=0)


class SegmentationTraining(Recipe):
    """The keys of segmentation besides those of every transfer run.

    ``output_stride`` is the stride of the trunk's last map: later strides become dilations. ``ignored_in_mean`` divides the
    loss by all pixels, as mmsegmentation does; otherwise by those with a label. ``schedule`` is ``poly``, which falls to
    ``min_lr`` with ``power``, or ``step``, by ``gamma`` at ``milestones``. ``save_predictions`` keeps, per test image and
    class, the numbers of pixels from which IoU is computed.
    """

    data: SegmentationData
    output_stride: Literal[8, 16] = 8
    align_corners: bool = False
    head: HeadRecipe = HeadRecipe()
    auxiliary: AuxiliaryRecipe | None = AuxiliaryRecipe()
    augment: SegmentationAugment
    evaluation: SegmentationTest = SegmentationTest()
    batch_size: int = Field(16, ge=2)
    iterations: int = Field(ge=1)
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["poly", "step"] = "poly"
    power: float = Field(0.9, gt=0)
    min_lr: float = Field(1e-4, ge=0)
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)
    ignored_in_mean: bool = True
    save_predictions: bool = operational(True)

    @model_validator(mode="after")
    def _rates(self) -> SegmentationTraining:
        if self.schedule == "poly" and self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        return self

    def factor(self, step: int) -> float:
        """The learning rate of a step, over ``lr``."""
        if self.schedule == "step":
            return self.gamma ** sum(step >= milestone for milestone in self.milestones)
        left = float((1 - step / self.iterations) ** self.power)
        return (self.min_lr + (self.lr - self.min_lr) * left) / self.lr
