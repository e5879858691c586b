"""What the protocols of classification share: their data, the test-time view, a linear classifier and how it is trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator
from typing_extensions import override

from mixmask.engine.backbones import BackboneRecipe, build_trunk
from mixmask.engine.collectives import gather_dealt
from mixmask.engine.config import Recipe, added, operational
from mixmask.engine.crops import CropRecipe
from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe, OpenImages, require_same_classes
from mixmask.engine.distributed import on_rank0
from mixmask.engine.errors import ConfigError
from mixmask.engine.features import outputs_of
from mixmask.engine.flops import forward_flops, num_parameters
from mixmask.engine.gradients import without_gradients
from mixmask.engine.images import ImageSet
from mixmask.engine.job import Job, Part
from mixmask.engine.knn import top1
from mixmask.engine.late import torch
from mixmask.engine.loader import Batch, BatchPlan, Interpolation, check_crop, open_source
from mixmask.engine.normalization import normalize
from mixmask.engine.predictions import CLASSES, ClassPredictions
from mixmask.engine.randomness import derived_seed
from mixmask.engine.training import train
from mixmask.engine.workload import Workload
from mixmask.transfer.divergence import DivergenceWatch, say_if_at_chance
from mixmask.transfer.protocol import Setting, TransferRecipe, beyond_end, require_shares

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mixmask.transfer.classifier import Classifier

Epoch = Annotated[int, Field(ge=1, le=10**6)]
Images = Setting[ImageSet]
MOST_APART = 1.5  # times larger than the other may the crop of training or testing be, without a remark (FixRes: 1.3)


class EvaluationRecipe(Recipe):
    """Test-time view: short side to ``resize`` pixels (null leaves the image), then the central ``crop``.

    ``interpolation`` is how the image is resized.
    """

    resize: int | None = Field(256, ge=8, le=8192)
    crop: int = Field(224, ge=8, le=8192)
    interpolation: Interpolation = added("bilinear")
    batch_size: int = operational(256, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> EvaluationRecipe:
        if self.resize is not None and self.resize < self.crop:
            raise ValueError(f"resize {self.resize} is smaller than crop {self.crop}")
        return self


class ClassifyRecipe(TransferRecipe):
    """What the protocols of classification share. ``save_predictions`` keeps every test image's answer for comparisons."""

    takes_any_channels: ClassVar[bool] = True
    multi_label: ClassVar[bool] = False  # whether it can measure on images with several labels each

    data: DataRecipe
    evaluation: EvaluationRecipe = EvaluationRecipe()
    save_predictions: bool = operational(True)

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[ImageSet, ImageSet]:
        train, test = open_images(self.data, "train"), open_images(self.data, "test")
        if train.targets.ndim == 2 and not self.multi_label:
            raise ConfigError(
                f"protocol {self.protocol}: the images of '{self.data.name}' have several labels each, and this protocol "
                f"needs one; use logreg (metric=mAP) or svm_voc07"
            )
        require_same_classes(train, test, self.data.allow_overlap)
        return train, test

    @override
    def workload(self, backbone: BackboneRecipe, train: ImageSet, test: ImageSet) -> Workload:
        num = len(train) + len(test)
        flops = forward_flops(backbone, self.evaluation.crop)
        return Workload(
            forward=num * flops,
            side=self.evaluation.crop,
            loaded=0 if self.is_resident else num,
            half=self.precision != "fp32",
        )

    @property
    def is_resident(self) -> bool:
        """Whether images are decoded once and stay in memory."""
        return self.data.storage == "resident"


class TrainedRecipe(ClassifyRecipe):
    """What the protocols share that train a linear classifier with SGD, alone or with the trunk.

    ``augment`` is the training view. ``milestones`` are epochs after which the rate is multiplied by ``gamma``.
    ``save_classifier`` keeps the trained classifier as ``classifier.safetensors``, for the protocol ``robustness``.
    """

    augment: CropRecipe | None = CropRecipe()
    save_classifier: bool = operational(False)
    momentum: float = Field(0.9, ge=0, lt=1)
    batch_size: int = Field(256, ge=2, le=2**22)
    epochs: int = Field(ge=1, le=10**6)
    milestones: tuple[Epoch, ...]
    gamma: float = Field(gt=0, le=1)

    @property
    @abstractmethod
    def slower(self) -> str | None:
        """The override that takes a tenth of the classifier's learning rate; None if it has several."""

    @property
    def in_steps(self) -> bool:
        """Whether the rate falls at ``milestones``."""
        return True

    @override
    def remarks(self) -> list[str]:
        remarks = beyond_end(self.milestones, self.epochs, "epochs") if self.in_steps else []
        if self.augment is not None:
            sides = sorted((self.augment.crop, self.evaluation.crop))
            if sides[1] > MOST_APART * sides[0]:
                remarks.append(
                    f"augment.crop is {self.augment.crop} and evaluation.crop {self.evaluation.crop}: a network that is "
                    f"trained and tested at such different sizes answers worse; set both"
                )
        return remarks

    @override
    def check_processes(self, processes: int) -> None:
        require_shares(self.batch_size, processes)

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[ImageSet, ImageSet]:
        train, test = super().open(open_images)
        train = self.labelled(train)
        if self.batch_size > len(train):
            raise ConfigError(
                f"batch_size {self.batch_size} is larger than the {len(train)} labelled images of "
                f"'{self.data.name}': choose at most {len(train)}"
            )
        if self.augment is not None:
            check_crop(train, self.data, self.augment)
        return train, test

    def labelled(self, train: ImageSet) -> ImageSet:
        """The training images whose labels are used: all of them by default."""
        return train

    trains_trunk: ClassVar[bool] = True  # whether the trunk is trained, too

    @override
    def workload(self, backbone: BackboneRecipe, train: ImageSet, test: ImageSet) -> Workload:
        once = super().workload(backbone, train, test)
        if self.augment is None:
            return once
        seen = self.epochs * len(train)
        passed, tested = (
            num * forward_flops(backbone, side)
            for num, side in ((seen, self.augment.crop), (len(test), self.evaluation.crop))
        )
        return replace(
            once,
            trained=passed if self.trains_trunk else 0.0,
            forward=tested + (0.0 if self.trains_trunk else passed),
            side=self.augment.crop,
            loaded=0 if self.is_resident else seen + len(test),
            steps=seen // self.batch_size,
            parameters=num_parameters(backbone) if self.trains_trunk else 0,
            kind="finetune" if self.trains_trunk else "frozen",
        )


def trunk_of(setting: Images) -> nn.Module:
    """The trunk with its pretrained weights, on the device."""
    trunk = build_trunk(setting.source.info.recipe)
    trunk.load_state_dict(setting.source.state, strict=True)
    return trunk.to(setting.device).to(memory_format=torch.channels_last)


def save_answers(recipe: ClassifyRecipe, setting: Images, predicted: Tensor, labels: Tensor) -> None:
    """Keep every test image's answer, if the recipe wants them: (N,) predicted classes and (N,) labels."""
    if recipe.save_predictions:
        answers = ClassPredictions(setting.data["test"], labels.cpu().numpy(), predicted.cpu().numpy())
        on_rank0(lambda: answers.write(setting.run.path / CLASSES))


def new_classifier(recipe: TrainedRecipe, setting: Images, trunk: Callable[[], nn.Module]) -> Classifier:
    """The trunk with a new classifier; its initial weights depend on the seed only."""
    from mixmask.transfer.classifier import Classifier

    torch.manual_seed(derived_seed(recipe.seed, "head"))
    built = trunk()  # after the seed: building the trunk draws random weights, too, before the classifier's
    return Classifier(built, len(setting.train.classes)).to(setting.device)


def finetune(
    recipe: TrainedRecipe,
    setting: Images,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int, int], float],
) -> dict[str, float]:
    """Train on augmented images, and test after the last epoch."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(images).float(), labels)

    result = train_on_views(recipe, setting, setting.train, model, optimizer, schedule, loss)
    tested = seen_as_in_tests(f"{recipe.name}: test images", model.eval(), setting.test, recipe, setting)
    ranked, labels = rank_classes(tested, len(setting.train.classes), setting.device)
    return {**scored(recipe, setting, ranked, labels), **result}


def train_on_views(
    recipe: TrainedRecipe,
    setting: Images,
    images: ImageSet,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int, int], float],
    loss: Callable[[Tensor, Tensor], Tensor],
    after_step: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Train on augmented views of the images.

    Args:
        recipe: The training view, the batch size and the length.
        setting: Where.
        images: What to train on.
        model: What has state.
        optimizer: With the base learning rates.
        schedule: From the step, the steps of an epoch and all steps to a factor of the base learning rates.
        loss: From (N, 3, H, W) normalised images and their labels to a scalar.
        after_step: Called with the step after the optimizer's step.
    """
    plan = batch_plan(recipe, images)
    source = open_source(images, recipe.data, setting.device)
    total = recipe.epochs * plan.steps_per_epoch
    job = new_job(recipe, setting, model, optimizer, schedule, plan, after_step)
    assert recipe.augment is not None  # else the classifier learns from features
    views: list[CropRecipe] = [recipe.augment]

    def batches(first: int) -> Iterator[Batch]:
        return source.training(plan, views, first, total)

    def losses(batch: Batch, step: int) -> list[Part]:
        def part() -> dict[str, Tensor]:
            views = normalize(batch.views[0], setting.normalization).contiguous(memory_format=torch.channels_last)
            return {"loss": loss(views, batch.labels)}

        return [part]

    return train(job, batches, losses)


def scored(recipe: TrainedRecipe, setting: Images, ranked: Tensor, labels: Tensor) -> dict[str, float]:
    """Keep what was answered, and say how good it is."""
    num_classes = len(setting.train.classes)
    save_answers(recipe, setting, ranked[:, 0], labels)
    found = accuracies(ranked, labels, num_classes)
    say_if_at_chance(recipe.name, found["top1"], num_classes)
    return found


def new_job(
    recipe: TrainedRecipe,
    setting: Images,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int, int], float],
    plan: BatchPlan,
    after_step: Callable[[int], None] | None = None,
) -> Job:
    """What the training loop is told; ``schedule`` takes the step, the steps of an epoch, and all steps."""
    per_epoch = plan.steps_per_epoch
    total = recipe.epochs * per_epoch
    return Job(
        title=recipe.name,
        run=setting.run,
        fingerprint=setting.fingerprint,
        data=setting.data,
        model=model,
        optimizer=optimizer,
        schedule=lambda step: schedule(step, per_epoch, total),
        num_steps=total,
        images_per_step=recipe.batch_size,
        device=setting.device,
        seed=recipe.seed,
        precision=recipe.precision,
        after_step=after_step,
        log_every=recipe.log_every,
        checkpoint_every=recipe.checkpoint_every,
        watch=None if recipe.slower is None else DivergenceWatch(len(setting.train.classes), total // 5, recipe.slower),
    )


def batch_plan(recipe: TrainedRecipe, images: ImageSet) -> BatchPlan:
    """The order of the labelled images; an epoch's last, smaller batch is used too."""
    return BatchPlan(len(images), recipe.batch_size, drop_last=False, seed=recipe.seed)


def seen_as_in_tests(
    title: str,
    network: Callable[[Tensor], Tensor],
    images: ImageSet,
    recipe: ClassifyRecipe,
    setting: Images,
    evaluation: EvaluationRecipe | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a network gives for the test-time view of this process's share of the images, with their labels.

    Args:
        title: Shown with the progress.
        network: On ``setting.device``, in eval mode.
        images: All images.
        recipe: How they are read, and the number format of the forward pass.
        setting: The device and the normalisation.
        evaluation: Another view than the recipe's.
    """
    view = evaluation or recipe.evaluation
    return outputs_of(
        title,
        network,
        open_source(images.shard(), recipe.data, setting.device),
        setting.device,
        batch_size=view.batch_size,
        resize=view.resize,
        crop=view.crop,
        precision=recipe.precision,
        normalization=setting.normalization,
        interpolation=view.interpolation,
    )


@without_gradients
def rank_classes(
    logits: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device, everyone: bool = False
) -> tuple[Tensor, Tensor]:
    """(N, 5) most likely classes, best first (fewer if there are fewer), and (N,) labels, of the images of all processes.

    Args:
        logits: Batches of (n, ``num_classes``) logits and labels; with several processes, of this one's images.
        num_classes: Number of classes.
        device: Where they are.
        everyone: Whether the batches hold all processes' images already.
    """
    ranked = [torch.empty(0, min(5, num_classes), dtype=torch.int64, device=device)]  # a process may have no image
    answers = [torch.empty(0, dtype=torch.int64, device=device)]
    for batch, labels in logits:
        ranked.append(batch.float().topk(min(5, num_classes), dim=1).indices)
        answers.append(labels)
    found, wanted = torch.cat(ranked), torch.cat(answers)
    return (found, wanted) if everyone else (gather_dealt(found), gather_dealt(wanted))


def accuracies(ranked: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """``top1`` and, with more than five classes, ``top5`` in percent, of what `rank_classes` gives."""
    result = {"top1": top1(ranked[:, 0], labels)}
    if num_classes > 5:
        result["top5"] = 100.0 * float((ranked == labels[:, None]).any(dim=1).double().mean())
    return result
