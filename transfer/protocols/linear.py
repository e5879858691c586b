"""A linear classifier on the frozen trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import override

from mixmask.engine.config import Recipe, added
from mixmask.engine.errors import RunFailure
from mixmask.engine.images import ImageSet
from mixmask.engine.job import Part
from mixmask.engine.knn import extract_features
from mixmask.engine.loader import open_source
from mixmask.engine.schedule import step_factor
from mixmask.engine.training import train
from mixmask.transfer.classification import (
    Classifier,
    Epoch,
    Images,
    TrainedRecipe,
    batch_plan,
    finetune,
    new_classifier,
    new_job,
    scored,
    trunk_of,
)


class ProbeOptimizer(Recipe):
    """Which optimizer trains a probe; ``adam`` has no use for ``momentum``."""

    kind: Literal["sgd", "adam"] = "sgd"


class LinearRecipe(TrainedRecipe):
    """A linear classifier on the frozen trunk (protocols of MoCo, ``main_lincls.py``): SGD, rate 30, ×0.1 at 60 and 80.

    ``augment: null`` trains on fixed features: every image's test-time view goes through the trunk once. With
    ``schedule: exponential`` the rate falls from ``lr`` to ``final_lr``, by the same factor every epoch. W-MSE's probe
    (arXiv:2007.06346, `htdt/self-supervised` ``eval/sgd.py``) is that with Adam: ``cifar100_linear_wmse.yaml``.
    """

    protocol: Literal["linear"]
    optimizer: ProbeOptimizer = added(ProbeOptimizer())
    schedule: Literal["step", "exponential"] = added("step")
    final_lr: float | None = added(None, gt=0, le=1e6)
    lr: float = Field(30.0, gt=0, le=1e30)
    epochs: int = Field(100, ge=1, le=10**6)
    milestones: tuple[Epoch, ...] = (60, 80)
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _final_rate(self) -> LinearRecipe:
        if (self.schedule == "exponential") != (self.final_lr is not None):
            raise ValueError("schedule: exponential and final_lr go together: set both, or neither")
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
    def slower(self) -> str:
        return f"lr={self.lr / 10:g}"

    @property
    @override
    def in_steps(self) -> bool:
        return self.schedule == "step"

    @override
    def settings(self, train: ImageSet) -> dict[str, Any]:
        return {"lr": self.lr, "epochs": self.epochs, "batch_size": self.batch_size, "epoch": "last"}

    def measure(self, setting: Images) -> dict[str, float]:
        """Top-1 and top-5 of the last epoch on the test split, in percent.

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
        model = new_classifier(self, setting, trunk, frozen=True)
        parameters = [*model.head.parameters()]
        optimizer: torch.optim.Optimizer
        if self.optimizer.kind == "adam":
            optimizer = torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

        def schedule(step: int, per_epoch: int, total: int) -> float:
            if self.final_lr is not None:
                return float((self.final_lr / self.lr) ** (step // per_epoch / self.epochs))
            return step_factor(step // per_epoch, self.milestones, self.gamma)

        learn = _train_on_features if self.augment is None else finetune
        result = learn(self, setting, model, optimizer, schedule)
        require_unchanged(model.trunk, state)
        return {f"linear/{name}" if name.startswith("top") else name: value for name, value in result.items()}


def require_unchanged(trunk: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Compare every tensor of a frozen trunk with its source.

    Raises:
        RunFailure: With the names of those that differ.
    """
    changed = [name for name, value in trunk.state_dict().items() if not torch.equal(value.cpu(), source[name])]
    if changed:
        raise RunFailure(f"the frozen trunk changed during the linear probe: {', '.join(changed[:5])}")


def _train_on_features(
    recipe: LinearRecipe,
    setting: Images,
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
        for split, images in (("training", setting.train), ("test", setting.test))
    )
    plan = batch_plan(recipe, setting.train)
    total = recipe.epochs * plan.steps_per_epoch

    def batches(first: int) -> Iterator[list[int]]:
        return (batch[plan.share(batch)] for _, _, batch in plan.from_step(first, total))

    def losses(rows: list[int], step: int) -> list[Part]:
        which = torch.tensor(rows, device=features.device)
        return [lambda: {"loss": F.cross_entropy(model.head(features[which]).float(), labels[which])}]

    result = train(new_job(recipe, setting, model, optimizer, schedule, plan), batches, losses)
    with torch.no_grad():
        logits = model.head(asked)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return {**scored(recipe, setting, ranked, answers), **result}
