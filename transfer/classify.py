"""Classification transfer: kNN, a linear probe, and finetuning on a share of the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.augment import CropRecipe, Normalization, normalize
from engine.backbones import build_trunk, width_of
from engine.datasets import ImageSet
from engine.distributed import first_only, gather_dealt, share_statistics, world
from engine.errors import RunFailure
from engine.heads import Head
from engine.job import Job, Part
from engine.knn import extract_features, knn_of_sources, top1
from engine.loader import Batch, BatchPlan, ImageSource, num_batches, open_source
from engine.precision import autocast
from engine.predictions import CLASSES, ClassPredictions
from engine.progress import say, track
from engine.randomness import derived_seed
from engine.schedule import cosine_factor, step_factor
from engine.storage import RunDirectory
from engine.training import train
from transfer.checkpoints.source import Source
from transfer.recipe import ClassifyBase, EvaluationRecipe, KnnRecipe, LinearRecipe, SemisupRecipe


@dataclass(frozen=True)
class Setting:
    """What a classification run is given besides its recipe. ``train_images`` is already the labelled subset."""

    run: RunDirectory
    fingerprint: str
    data: dict[str, Any]
    device: torch.device
    source: Source
    train_images: ImageSet
    test_images: ImageSet
    normalization: Normalization


def _trunk(setting: Setting) -> nn.Module:
    trunk = build_trunk(setting.source.info.recipe)
    trunk.load_state_dict(setting.source.state, strict=True)
    return trunk.to(setting.device).to(memory_format=torch.channels_last)


def _with_head(setting: Setting) -> nn.Module:
    """The trunk and the projection head behind it."""
    info = setting.source.info.head
    assert info is not None  # `transfer.stage.plan` has made sure
    head = Head(info)
    head.load_state_dict(setting.source.head, strict=True)
    return nn.Sequential(_trunk(setting), head.to(setting.device))


def run_knn(recipe: KnnRecipe, setting: Setting) -> dict[str, float]:
    """kNN top-1 of the test split against the training split, in percent."""
    network = _with_head(setting) if recipe.features == "head" else _trunk(setting)
    predicted, labels = knn_of_sources(
        recipe.name,
        network.eval(),
        open_source(setting.train_images.shard(), recipe.data, setting.device),
        open_source(setting.test_images.shard(), recipe.data, setting.device),
        batch_size=recipe.evaluation.batch_size,
        resize=recipe.evaluation.resize,
        crop=recipe.evaluation.crop,
        precision=recipe.precision,
        k=recipe.k,
        temperature=recipe.temperature,
        normalization=setting.normalization,
    )
    _save(recipe, setting, predicted, labels)
    accuracy = top1(predicted, labels)
    say(
        f"{recipe.name}: kNN top-1 {accuracy:.2f} % "
        f"(k {recipe.k}, temperature {recipe.temperature}, {knn_features(recipe)})"
    )
    return {"knn/top1": accuracy}


def knn_features(recipe: KnnRecipe) -> str:
    """What the neighbours are found by, in words."""
    return f"{'projection head' if recipe.features == 'head' else 'trunk'} output, L2-normalised"


def _save(recipe: ClassifyBase, setting: Setting, predicted: Tensor, labels: Tensor) -> None:
    if recipe.save_predictions:
        answers = ClassPredictions(setting.data["test"], labels.cpu().numpy(), predicted.cpu().numpy())
        first_only(lambda: answers.write(setting.run.path / CLASSES))


class Classifier(nn.Module):
    """A trunk and a linear classifier; with ``frozen`` the trunk is in eval mode always and gets no gradient."""

    def __init__(self, trunk: nn.Module, num_classes: int, frozen: bool) -> None:
        super().__init__()
        self.trunk, self.frozen = trunk, frozen
        self.head = nn.Linear(width_of(trunk), num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        trunk.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> Classifier:
        """As `nn.Module.train`, but a frozen trunk stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) normalised images to (N, classes) logits."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.trunk(images)
        logits: Tensor = self.head(features)
        return logits


def run_linear(recipe: LinearRecipe, setting: Setting) -> dict[str, float]:
    """Linear probe: top-1 and top-5 of the last epoch on the test split, in percent.

    Raises:
        RunFailure: If a weight of the frozen trunk changed.
    """
    model = _classifier(recipe, setting, frozen=True)
    parameters = [*model.head.parameters()]
    optimizer: torch.optim.Optimizer
    if recipe.optimizer.kind == "adam":
        optimizer = torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )

    def schedule(step: int, per_epoch: int, total: int) -> float:
        if recipe.final_lr is not None:
            return float((recipe.final_lr / recipe.lr) ** (step // per_epoch / recipe.epochs))
        return step_factor(step // per_epoch, recipe.milestones, recipe.gamma)

    learn = _train_on_features if recipe.augment is None else _finetune
    result = learn(recipe, setting, model, optimizer, schedule)
    require_unchanged(model.trunk, setting.source.state)
    return {f"linear/{name}" if name.startswith("top") else name: value for name, value in result.items()}


def require_unchanged(trunk: nn.Module, source: dict[str, Tensor]) -> None:
    """Compare every tensor of a frozen trunk with its source.

    Raises:
        RunFailure: With the names of those that differ.
    """
    changed = [name for name, value in trunk.state_dict().items() if not torch.equal(value.cpu(), source[name])]
    if changed:
        raise RunFailure(f"the frozen trunk changed during the linear probe: {', '.join(changed[:5])}")


def run_semisup(recipe: SemisupRecipe, setting: Setting) -> dict[str, float]:
    """Finetuning of trunk and classifier: top-1 and top-5 of the last epoch on the test split, in percent."""
    model = _classifier(recipe, setting, frozen=False)
    if recipe.sync_bn and world().size > 1:
        share_statistics(model)
    lr_trunk, lr_head = recipe.rates
    optimizer = torch.optim.SGD(
        [
            {"params": [*model.trunk.parameters()], "lr": lr_trunk},
            {"params": [*model.head.parameters()], "lr": lr_head},
        ],
        lr=lr_head,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    say(f"{recipe.name}: {len(setting.train_images)} labelled images, lr {lr_trunk:g} trunk, {lr_head:g} classifier")

    def schedule(step: int, per_epoch: int, total: int) -> float:
        if recipe.shape == "cosine":
            return cosine_factor(step, total)
        return step_factor(step // per_epoch, recipe.milestones, recipe.gamma)

    result = _finetune(recipe, setting, model, optimizer, schedule)
    return {f"semisup/{name}" if name.startswith("top") else name: value for name, value in result.items()}


def _classifier(recipe: LinearRecipe | SemisupRecipe, setting: Setting, frozen: bool) -> Classifier:
    torch.manual_seed(derived_seed(recipe.seed, "head"))
    model = Classifier(_trunk(setting), len(setting.train_images.classes), frozen)
    return model.to(setting.device)


def _finetune(
    recipe: LinearRecipe | SemisupRecipe,
    setting: Setting,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int, int], float],
) -> dict[str, float]:
    plan = batch_plan(recipe, setting.train_images)
    source = open_source(setting.train_images, recipe.data, setting.device)
    test_source = open_source(setting.test_images.shard(), recipe.data, setting.device)
    total = recipe.epochs * plan.steps_per_epoch
    job = _job(recipe, setting, model, optimizer, schedule, plan)
    assert recipe.augment is not None  # else the classifier learns from features
    views: list[CropRecipe] = [recipe.augment]

    def batches(first: int) -> Iterator[Batch]:
        return source.training(plan, views, first, total)

    def losses(batch: Batch, step: int) -> list[Part]:
        def cross_entropy() -> dict[str, Tensor]:
            images = normalize(batch.views[0], setting.normalization).contiguous(memory_format=torch.channels_last)
            return {"loss": F.cross_entropy(model(images).float(), batch.labels)}

        return [cross_entropy]

    result = train(job, batches, losses)
    ranked, labels = rank_classes(model, test_source, recipe.evaluation, recipe, setting.normalization)
    return {**_scored(recipe, setting, ranked, labels), **result}


def _train_on_features(
    recipe: LinearRecipe,
    setting: Setting,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int, int], float],
) -> dict[str, float]:
    """Train the classifier on features that are computed once, from every image's test-time view."""
    (features, labels), (asked, answers) = (
        extract_features(
            f"{recipe.name}: {split} features",
            model.trunk,
            open_source(images.shard(), recipe.data, setting.device),
            batch_size=recipe.evaluation.batch_size,
            resize=recipe.evaluation.resize,
            crop=recipe.evaluation.crop,
            precision=recipe.precision,
            normalization=setting.normalization,
        )
        for split, images in (("training", setting.train_images), ("test", setting.test_images))
    )
    plan = batch_plan(recipe, setting.train_images)
    total = recipe.epochs * plan.steps_per_epoch

    def batches(first: int) -> Iterator[list[int]]:
        return (batch[plan.share(batch)] for _, _, batch in plan.from_step(first, total))

    def losses(rows: list[int], step: int) -> list[Part]:
        which = torch.tensor(rows, device=features.device)
        return [lambda: {"loss": F.cross_entropy(model.head(features[which]).float(), labels[which])}]

    result = train(_job(recipe, setting, model, optimizer, schedule, plan), batches, losses)
    with torch.no_grad():
        logits = model.head(asked)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return {**_scored(recipe, setting, ranked, answers), **result}


def _scored(recipe: LinearRecipe | SemisupRecipe, setting: Setting, ranked: Tensor, labels: Tensor) -> dict[str, float]:
    """Keep what was answered, and say how good it is."""
    num_classes = len(setting.train_images.classes)
    _save(recipe, setting, ranked[:, 0], labels)
    found = accuracies(ranked, labels, num_classes)
    _say_if_at_chance(recipe, found["top1"], num_classes)
    return found


def _job(
    recipe: LinearRecipe | SemisupRecipe,
    setting: Setting,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int, int], float],
    plan: BatchPlan,
) -> Job:
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
        log_every=recipe.log_every,
        checkpoint_every=recipe.checkpoint_every,
        watch=_DivergenceWatch(len(setting.train_images.classes), total // 5),
    )


class _DivergenceWatch:
    """Says when a classifier's loss is well over that of one that knows nothing and does not fall.

    A rate that is too high does that. A loss that begins high and falls is no sign of it.

    Args:
        num_classes: Number of classes.
        settled: From which step on; a probe's first steps may jump with the published rates, too.
    """

    def __init__(self, num_classes: int, settled: int) -> None:
        self.start = math.log(max(num_classes, 2))  # of a classifier that knows nothing
        self.settled = settled
        self.before: float | None = None

    def __call__(self, line: Mapping[str, float], step: int) -> str | None:
        before, self.before = self.before, line["loss"]
        falls = before is None or line["loss"] < 0.9 * before
        if step < self.settled or falls or not line["loss"] > 1.5 * self.start:
            return None
        return (
            f"the loss is {line['loss']:.3g}, and a classifier that knows nothing has {self.start:.3g}: the learning rate "
            f"{line['lr']:.3g} is probably too high for these features"
        )


def _say_if_at_chance(recipe: LinearRecipe | SemisupRecipe, top1: float, num_classes: int) -> None:
    chance = 100 / num_classes
    if num_classes > 2 and top1 <= 1.2 * chance:
        say(
            f"{recipe.name}: warning: top-1 is {top1:.2f} %, and guessing gives {chance:.2f} %: nothing was learnt. The "
            f"learning rate or the backbone does not fit"
        )


def batch_plan(recipe: LinearRecipe | SemisupRecipe, images: ImageSet) -> BatchPlan:
    """The order of the labelled images; an epoch's last, smaller batch is used too."""
    return BatchPlan(len(images), recipe.batch_size, drop_last=False, seed=recipe.seed)


@torch.no_grad()
def rank_classes(
    model: Classifier,
    source: ImageSource,
    evaluation: EvaluationRecipe,
    recipe: LinearRecipe | SemisupRecipe,
    normalization: Normalization = "imagenet",
) -> tuple[Tensor, Tensor]:
    """(N, 5) most likely classes, best first (fewer if there are fewer), and (N,) labels, of the images of all processes."""
    model.eval()
    device = next(model.parameters()).device
    ranked, answers = [], []
    batches = source.evaluation(evaluation.batch_size, evaluation.resize, evaluation.crop)
    total = num_batches(len(source.images), evaluation.batch_size)
    for images, labels in track(f"{recipe.name}: test images", batches, total, evaluation.batch_size):
        with autocast(device, recipe.precision):
            logits = model(normalize(images, normalization).contiguous(memory_format=torch.channels_last)).float()
        ranked.append(logits.topk(min(5, logits.shape[1]), dim=1).indices)
        answers.append(labels)
    return gather_dealt(torch.cat(ranked)), gather_dealt(torch.cat(answers))


def accuracies(ranked: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """``top1`` and, with more than five classes, ``top5`` in percent, of what `rank_classes` gives."""
    result = {"top1": top1(ranked[:, 0], labels)}
    if num_classes > 5:
        result["top5"] = 100.0 * float((ranked == labels[:, None]).any(dim=1).double().mean())
    return result
