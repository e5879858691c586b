"""Finetuning the whole network on a share of the labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from mixmask.engine.batch_statistics import synchronise_batchnorm
from mixmask.engine.config import added, operational
from mixmask.engine.crops import CropRecipe
from mixmask.engine.errors import ConfigError
from mixmask.engine.images import ImageSet
from mixmask.engine.late import torch
from mixmask.engine.progress import say
from mixmask.engine.schedule import cosine_factor, step_factor
from mixmask.transfer.classification import Epoch, Images, TrainedRecipe, finetune, new_classifier, trunk_of
from mixmask.transfer.classifier_file import save_classifier
from mixmask.transfer.subsets import balanced_subset, listed_subset

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


class SemisupRecipe(TrainedRecipe):
    """Finetuning everything on a share of the labels: SGD, 20 epochs, two learning rates (MixMask, section 4.4).

    ``preset`` names a published pair of rates for 1, 10 and 100 % of labels; ``lr_trunk`` and ``lr_head`` replace them.
    ``schedule`` is the preset's by default: cosine for ``barlow``, steps for the others. ``label_list`` names the
    labelled images (SimCLR's lists) where ``labels`` would draw a class-balanced subset. ``sync_bn`` takes batch statistics
    over all processes: by default where the preset's own code does, which is SwAV's.
    """

    protocol: Literal["semisup"]
    augment: CropRecipe = CropRecipe()
    labels: float = Field(gt=0, le=100)
    label_list: str | None = operational(None)
    subset_seed: int = Field(0, ge=0)
    preset: Preset = "paper_table"
    lr_trunk: float | None = Field(None, ge=0, le=1e6)
    lr_head: float | None = Field(None, gt=0, le=1e6)
    epochs: int = Field(20, ge=1, le=10**6)
    weight_decay: float = Field(0.0, ge=0, le=1e6)
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

    @property
    @override
    def record_name(self) -> str:
        return f"semisup_{self.labels:g}"

    @property
    @override
    def slower(self) -> str:
        return f"lr_head={self.rates[1] / 10:g}"

    @property
    @override
    def title(self) -> str:
        return f"{self.labels:g} % of labels"

    @property
    @override
    def headlines(self) -> Mapping[str, str]:
        return {"semisup/top1": f"{self.title} top-1"}

    @property
    @override
    def in_steps(self) -> bool:
        return self.shape == "step"

    @override
    def settings(self, train: ImageSet) -> dict[str, Any]:
        lr_trunk, lr_head = self.rates
        return {
            "labels": self.labels,
            "num_labelled": len(train),
            "lr_trunk": lr_trunk,
            "lr_head": lr_head,
            "epochs": self.epochs,
            "epoch": "last",
        }

    @override
    def num_labelled(self, num_train: int) -> int:
        return round(num_train * self.labels / 100)

    @override
    def labelled(self, train: ImageSet) -> ImageSet:
        if self.label_list is None:
            return balanced_subset(train, self.labels, self.subset_seed)
        listed = listed_subset(train, Path(self.label_list).expanduser())
        share = 100 * len(listed) / len(train)
        if not 0.8 * self.labels <= share <= 1.25 * self.labels:
            raise ConfigError(
                f"{self.label_list}: names {share:.2g} % of the {len(train):,} images, but labels is {self.labels:g}"
            )
        return listed

    def measure(self, setting: Images) -> dict[str, float]:
        """Top-1 and top-5 of the last epoch on the test split, in percent."""
        model = new_classifier(self, setting, lambda: trunk_of(setting))
        if self.sync_bn:
            synchronise_batchnorm(model, setting.device)
        lr_trunk, lr_head = self.rates
        optimizer = torch.optim.SGD(
            [
                {"params": [*model.trunk.parameters()], "lr": lr_trunk},
                {"params": [*model.head.parameters()], "lr": lr_head},
            ],
            lr=lr_head,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        say(f"{self.name}: {len(setting.train)} labelled images, lr {lr_trunk:g} trunk, {lr_head:g} classifier")

        def schedule(step: int, per_epoch: int, total: int) -> float:
            if self.shape == "cosine":
                return cosine_factor(step, total)
            return step_factor(step // per_epoch, self.milestones, self.gamma)

        result = finetune(self, setting, model, optimizer, schedule)
        if self.save_classifier:
            save_classifier(self, setting, model.trunk, model.head)
        return {f"semisup/{name}" if name.startswith("top") else name: value for name, value in result.items()}
