"""A linear classifier, or many side by side, on the frozen trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from mixmask.engine.config import Recipe, added
from mixmask.engine.data import open_split
from mixmask.engine.datasets import OpenImages
from mixmask.engine.errors import ConfigError, RunFailure
from mixmask.engine.host_values import to_device
from mixmask.engine.images import ImageSet
from mixmask.engine.job import Part
from mixmask.engine.late import torch
from mixmask.engine.progress import say
from mixmask.engine.randomness import derived_seed
from mixmask.engine.schedule import cosine_factor, step_factor, warmup_factor
from mixmask.engine.training import train
from mixmask.transfer.classification import (
    Epoch,
    Images,
    TrainedRecipe,
    batch_plan,
    new_job,
    rank_classes,
    scored,
    seen_as_in_tests,
    train_on_views,
    trunk_of,
)
from mixmask.transfer.classifier_file import save_classifier
from mixmask.transfer.features import FeatureOptions, frozen_features
from mixmask.transfer.logistic import fit_logistic
from mixmask.transfer.probe import Probe
from mixmask.transfer.selection import require_held_out, split_for_choice

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mixmask.transfer.probes import Probes

Rate = Annotated[float, Field(gt=0, le=1e30)]
Decay = Annotated[float, Field(ge=0, le=1e6)]


class ProbeOptimizer(Recipe):
    """Which optimizer trains a probe.

    ``lars`` scales each tensor's step by ``trust_coefficient`` · |w| / |gradient| (arXiv:1708.03888), as apex's LARC does
    without clipping. ``adam`` has L2 regularisation, ``adamw`` decoupled weight decay; both have no use for ``momentum``.
    ``lbfgs`` minimises the loss over all features at once (``augment: null``), for ``epochs`` iterations at most.
    """

    kind: Literal["sgd", "adam", "adamw", "lars", "lbfgs"] = "sgd"
    nesterov: bool = added(False)
    trust_coefficient: float = added(0.001, gt=0, le=1e6)


class LinearRecipe(FeatureOptions, TrainedRecipe):
    """A linear classifier on the frozen trunk (protocols of MoCo, ``main_lincls.py``): SGD, rate 30, ×0.1 at 60 and 80.

    ``lr``, ``weight_decay`` and ``batch_norm`` (BatchNorm without affine parameters before the classifier) may be lists: one
    probe for every combination is trained in the same pass, from the same start, on the same views. The one with the highest
    accuracy on held-out *training* images is tested: on the data set's official validation split, or on the share
    ``held_out`` of every class. The probes are trained on the rest. A single probe is trained on everything.

    ``augment: null`` trains on fixed features: every image's test-time view goes through the trunk once.

    The rate follows ``schedule``: ``step``, ``cosine`` (both change it every epoch, or every step with ``update_every:
    step``), or ``exponential`` from ``lr`` to ``final_lr``, after ``warmup_epochs`` of linear warm-up. W-MSE's probe
    (arXiv:2007.06346, `htdt/self-supervised` ``eval/sgd.py``) is the last one with Adam: ``cifar100_linear_wmse.yaml``.
    """

    trains_trunk: ClassVar[bool] = False

    protocol: Literal["linear"]
    optimizer: ProbeOptimizer = added(ProbeOptimizer())
    schedule: Literal["step", "exponential", "cosine"] = added("step")
    final_lr: float | None = added(None, gt=0, le=1e6)
    warmup_epochs: float = added(0.0, ge=0, le=1e6)
    update_every: Literal["epoch", "step"] = added("epoch")
    lr: Rate | tuple[Rate, ...] = 30.0
    weight_decay: Decay | tuple[Decay, ...] = 0.0
    batch_norm: bool | tuple[bool, ...] = added(False)
    held_out: float = added(0.1, gt=0, lt=1)
    epochs: int = Field(100, ge=1, le=10**6)
    milestones: tuple[Epoch, ...] = (60, 80)
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _keys_fit(self) -> LinearRecipe:
        if (self.schedule == "exponential") != (self.final_lr is not None):
            raise ValueError("schedule: exponential and final_lr go together: set both, or neither")
        if self.final_lr is not None and isinstance(self.lr, tuple):
            raise ValueError("schedule: exponential takes one lr: final_lr is the end of one rate only")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be below epochs {self.epochs}")
        for key in ("lr", "weight_decay", "batch_norm"):
            values = getattr(self, key)
            if isinstance(values, tuple) and len({*values}) < max(len(values), 1):
                raise ValueError(f"{key}: a list of different values was expected, got {list(values)}")
        if self.optimizer.kind == "lbfgs" and (self.augment is not None or isinstance(self.lr, tuple)):
            raise ValueError(
                "optimizer.kind: lbfgs has no learning rate and needs fixed features: set augment: null, one lr"
            )
        if self.optimizer.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov needs a momentum above 0")
        return self

    @property
    @override
    def title(self) -> str:
        return "linear"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        return {"linear/top1": "linear top-1"}

    @property
    @override
    def slower(self) -> str | None:
        # Of several probes the loss is a sum, and one that is too fast is not chosen.
        return None if isinstance(self.lr, tuple) or len(self.probes) > 1 else f"lr={self.lr / 10:g}"

    @property
    @override
    def in_steps(self) -> bool:
        return self.schedule == "step"

    @property
    def probes(self) -> list[Probe]:
        """One for every combination, in the order of the keys."""
        return [
            Probe(lr, weight_decay, batch_norm)
            for batch_norm in _listed(self.batch_norm)
            for lr in _listed(self.lr)
            for weight_decay in _listed(self.weight_decay)
        ]

    @override
    def settings(self, train: ImageSet) -> dict[str, Any]:
        chosen = {} if len(self.probes) == 1 else {"choice": f"best of {len(self.probes)} on held-out training images"}
        lr = self.lr if isinstance(self.lr, float) else ", ".join(f"{rate:g}" for rate in self.lr)
        return {"lr": lr, "epochs": self.epochs, "batch_size": self.batch_size, "epoch": "last", **chosen}

    @override
    def open(self, open_images: OpenImages = open_split) -> tuple[ImageSet, ImageSet]:
        train, test = super().open(open_images)
        if len(self.probes) > 1:
            rest, _ = split_for_choice(train, self.held_out, self.seed)
            require_held_out(train, self.held_out, self.seed)
            if self.batch_size > len(rest):
                raise ConfigError(
                    f"batch_size {self.batch_size} is larger than the {len(rest)} training images that are left without "
                    f"the held-out ones: choose at most {len(rest)}"
                )
        return train, test

    def measure(self, setting: Images) -> dict[str, float]:
        """Top-1 and top-5 of the last epoch on the test split, in percent; of several probes, those of the chosen one.

        Raises:
            RunFailure: If a weight of the frozen trunk changed.
        """
        return self.probe(setting, lambda: trunk_of(setting), setting.source.state)

    def probe(self, setting: Images, trunk: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> dict[str, float]:
        """Probe any network: ``trunk()`` gives it, and it maps images to (N, ``num_features``) features.

        Args:
            setting: Where and on what.
            trunk: Gives the network.
            state: Its weights, on the CPU, which must not change.
        """
        from mixmask.transfer.probes import Probes

        torch.manual_seed(derived_seed(self.seed, "head"))
        built = trunk()  # after the seed: building draws weights, too, and the classifier's come after them
        model = Probes(built, len(setting.train.classes), self.probes).to(setting.device)
        learn = _on_views if self.augment is not None else _on_features
        result = learn(self, setting, model)
        require_unchanged(model.trunk, state)
        return {
            f"linear/{name}" if name not in ("seconds", "images_per_second") else name: v for name, v in result.items()
        }

    def build_optimizer(self, model: Probes) -> torch.optim.Optimizer:
        """The optimizer of all probes: a group of parameters for each, with its rate and weight decay."""
        groups = [
            {"params": [*head.parameters()], "lr": probe.lr, "weight_decay": probe.weight_decay}
            for probe, head in zip(model.probes, model.heads, strict=True)
        ]
        rate, kind, options = model.probes[0].lr, self.optimizer.kind, self.optimizer
        if kind == "adam":
            return torch.optim.Adam(groups, lr=rate)
        if kind == "adamw":
            return torch.optim.AdamW(groups, lr=rate)
        if kind == "lars":  # without always_adapt, tensors without weight decay would take plain SGD's step
            from timm.optim import Lars

            lars: torch.optim.Optimizer = Lars(
                groups, lr=rate, momentum=self.momentum, nesterov=options.nesterov,
                trust_coeff=options.trust_coefficient, always_adapt=True,
            )  # fmt: skip
            return lars
        return torch.optim.SGD(groups, lr=rate, momentum=self.momentum, nesterov=options.nesterov)

    def factor(self, step: int, per_epoch: int, total: int) -> float:
        """The factor of the base learning rates at a step."""
        warmup = round(self.warmup_epochs * per_epoch)
        if step < warmup:
            return warmup_factor(step, warmup)
        if self.final_lr is not None:
            assert isinstance(self.lr, float)
            return float((self.final_lr / self.lr) ** (step // per_epoch / self.epochs))
        if self.schedule == "step":
            return step_factor(step // per_epoch, self.milestones, self.gamma)
        at = step if self.update_every == "step" else step // per_epoch * per_epoch
        return cosine_factor(max(at, warmup), total, warmup)


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def require_unchanged(trunk: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Compare every tensor of a frozen trunk with its source.

    Raises:
        RunFailure: With the names of those that differ.
    """
    changed = [name for name, value in trunk.state_dict().items() if not torch.equal(value.cpu(), source[name])]
    if changed:
        raise RunFailure(f"the frozen trunk changed during the linear probe: {', '.join(changed[:5])}")


def _on_views(recipe: LinearRecipe, setting: Images, model: Probes) -> dict[str, float]:
    """Train on augmented views; the trunk is run once for each view, whatever the number of probes."""
    images, held = _parts(recipe, setting)

    def features(images: ImageSet, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        return seen_as_in_tests(f"{recipe.name}: {what} images", model.trunk, images, recipe, setting)

    def loss(pixels: Tensor, labels: Tensor) -> Tensor:
        return model.loss(model.features(pixels), labels)

    optimizer = recipe.build_optimizer(model)
    result = train_on_views(recipe, setting, images, model, optimizer, recipe.factor, loss, model.bury)
    chosen, choice = _choice(
        recipe, model, None if held is None else features(held, "held-out"), 0 if held is None else len(held)
    )
    _keep(recipe, setting, model, chosen)
    ranked, answers = rank_classes(
        model.answers(features(setting.test, "test"), chosen, recipe.precision),
        len(setting.train.classes),
        setting.device,
    )
    return {**scored(recipe, setting, ranked, answers), **choice, **result}


def _on_features(recipe: LinearRecipe, setting: Images, model: Probes) -> dict[str, float]:
    """Train on features that are computed once, from every image's test-time view."""
    (features, labels), (asked, answers) = (
        frozen_features(recipe, setting, images, lambda: model.trunk) for images in (setting.train, setting.test)
    )
    images, held = _parts(recipe, setting)
    found, answered, kept = features, labels, None
    if held is not None:
        rows = split_for_choice(setting.train, recipe.held_out, recipe.seed, rows=True)
        learnt, kept = (torch.from_numpy(part) for part in rows)
        found, answered = features[learnt], labels[learnt]
    if recipe.optimizer.kind == "lbfgs":
        result = _minimise(recipe, model, found, answered)
    else:
        plan = batch_plan(recipe, images)
        total = recipe.epochs * plan.steps_per_epoch

        def batches(first: int) -> Iterator[list[int]]:
            return ([batch[row] for row in plan.share(batch)] for _, _, batch in plan.from_step(first, total))

        def losses(rows: list[int], step: int) -> list[Part]:
            which = to_device(torch.tensor(rows), features.device)
            return [lambda: {"loss": model.loss(found[which], answered[which])}]

        optimizer = recipe.build_optimizer(model)
        result = train(new_job(recipe, setting, model, optimizer, recipe.factor, plan, model.bury), batches, losses)
    size = recipe.evaluation.batch_size
    held_features = None if kept is None else _in_pieces(features[kept], labels[kept], size)
    chosen, choice = _choice(recipe, model, held_features, 0 if held is None else len(held), everyone=True)
    _keep(recipe, setting, model, chosen)
    answered_by = model.answers(_in_pieces(asked, answers, size), chosen, "fp32")
    ranked, answers = rank_classes(answered_by, len(setting.train.classes), setting.device, everyone=True)
    return {**scored(recipe, setting, ranked, answers), **choice, **result}


def _in_pieces(features: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of features that lie in memory: the logits of many probes for all of them at once would not fit."""
    for start in range(0, len(features), size):
        yield features[start : start + size], labels[start : start + size]


def _keep(recipe: LinearRecipe, setting: Images, model: Probes, chosen: int) -> None:
    """Save the chosen classifier, if the recipe wants it."""
    if recipe.save_classifier:
        norm = model.norm if recipe.probes[chosen].batch_norm else None
        save_classifier(recipe, setting, model.trunk, model.heads[chosen], norm)


def _minimise(recipe: LinearRecipe, model: Probes, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Fit every probe with L-BFGS, on all features at once."""
    model.train()
    if model.norm is not None:
        model.norm.set_to(features)
    model.eval()
    for probe, head in zip(recipe.probes, model.heads, strict=True):
        assert isinstance(head, torch.nn.Linear)
        inputs = model.norm(features) if model.norm is not None and probe.batch_norm else features
        fit_logistic(inputs, labels, head, weight_decay=probe.weight_decay, iterations=recipe.epochs)
    return {}


def _parts(recipe: LinearRecipe, setting: Images) -> tuple[ImageSet, ImageSet | None]:
    """What the probes learn from, and what the choice among them is made on: with a single probe, everything and nothing."""
    if len(recipe.probes) == 1:
        return setting.train, None
    return split_for_choice(setting.train, recipe.held_out, recipe.seed)


def _choice(
    recipe: LinearRecipe,
    model: Probes,
    held: Iterator[tuple[Tensor, Tensor]] | None,
    num: int,
    everyone: bool = False,
) -> tuple[int, dict[str, float]]:
    """The number of the best probe on held-out training images, and what is recorded of all of them."""
    from mixmask.transfer.probes import count_right

    if held is None:
        return 0, {}
    if not bool(model.alive.any()):
        raise RunFailure(f"{recipe.name}: all {len(recipe.probes)} probes have diverged; try lower learning rates")
    right = count_right(model, held, recipe.precision, everyone)
    accuracies = [100 * count / num for count in right]
    best = max(range(len(accuracies)), key=lambda number: accuracies[number])  # the first of equals
    probe = recipe.probes[best]
    say(f"{recipe.name}: chosen on {num:,} held-out training images: {probe}, {accuracies[best]:.2f} %")
    return best, {
        "held_out": accuracies[best],
        "chosen_lr": probe.lr,
        "chosen_weight_decay": probe.weight_decay,
        "chosen_batch_norm": float(probe.batch_norm),
        **{f"held_out/{one}": accuracy for one, accuracy in zip(recipe.probes, accuracies, strict=True)},
    }
