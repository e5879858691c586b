"""A trained classifier in one file: the trunk, what follows it, and how its images are seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.distributed import on_rank0
from mixmask.engine.errors import CheckpointError
from mixmask.engine.late import torch
from mixmask.engine.loader import Interpolation
from mixmask.engine.normalization import Normalization
from mixmask.engine.storage import write_atomic
from mixmask.transfer.classification import ClassifyRecipe, Images

if TYPE_CHECKING:
    from torch import nn

    from mixmask.transfer.classifier import SavedClassifier
    from mixmask.transfer.probes import FeatureNorm

FILE = "classifier.safetensors"
FORMAT = "mixmask-classifier-1"


class ClassifierInfo(BaseModel):
    """What is known of a classifier.

    Attributes:
        fingerprint: Of the run that trained it.
        parent: Of the backbone from which it was trained.
        protocol: How, such as ``linear``.
        dataset: On what.
        classes: Names of its outputs, in order.
        batch_norm: Whether `FeatureNorm` stands before the linear classifier.
        resize, crop, interpolation: The test-time view.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    parent: str
    protocol: str
    dataset: str
    backbone: BackboneRecipe
    classes: tuple[str, ...]
    batch_norm: bool
    resize: int | None
    crop: int
    interpolation: Interpolation
    normalization: Normalization


def save_classifier(
    recipe: ClassifyRecipe, setting: Images, trunk: nn.Module, head: nn.Module, norm: FeatureNorm | None = None
) -> None:
    """Write ``classifier.safetensors`` into the run directory; only the first process does."""
    from safetensors.torch import save

    view = recipe.evaluation
    info = ClassifierInfo(
        fingerprint=setting.fingerprint,
        parent=setting.source.info.fingerprint,
        protocol=recipe.record_name,
        dataset=recipe.data.name,
        backbone=setting.source.info.recipe,
        classes=setting.train.classes,
        batch_norm=norm is not None,
        resize=view.resize,
        crop=view.crop,
        interpolation=view.interpolation,
        normalization=setting.normalization,
    )
    parts: dict[str, Any] = {"trunk": trunk, "head": head, **({"norm": norm} if norm is not None else {})}
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    content = save(tensors, metadata={"format": FORMAT, "info": info.model_dump_json()})
    on_rank0(lambda: write_atomic(setting.run.path / FILE, lambda file: file.write(content)))


def read_info(path: Path) -> ClassifierInfo:
    """What a classifier's file says of it.

    Raises:
        CheckpointError: If the file is missing, damaged, or no classifier of this project's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; linear probes and finetuning write one with save_classifier=true")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged, or no classifier; {FILE} of a run with save_classifier=true is one ({error})"
        ) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no classifier; {FILE} of a run with save_classifier=true is one")
    try:
        return ClassifierInfo.model_validate(json.loads(metadata["info"]))
    except (ValidationError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its metadata are damaged ({str(error).splitlines()[0]})") from None


def load_classifier(path: Path, device: torch.device) -> tuple[SavedClassifier, ClassifierInfo]:
    """The classifier, in eval mode.

    Raises:
        CheckpointError: As `read_info`; also if its tensors do not fit.
    """
    from safetensors.torch import load_file

    from mixmask.transfer.classifier import SavedClassifier

    info = read_info(path)
    model = SavedClassifier(info)
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (RuntimeError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: its tensors do not fit ({str(error).splitlines()[0]})") from None
    return model.to(device).to(memory_format=torch.channels_last).eval(), info
