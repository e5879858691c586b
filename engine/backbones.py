"""Backbones: ResNet trunks under torchvision's names, and the file a trunk is kept in.

A trunk is a torchvision ResNet whose classifier is the identity: images (N, 3, H, W) in, features (N, num_features)
out. Its state has torchvision's names (``conv1.weight`` … ``layer4.2.bn3.running_var``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torchvision
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from engine.config import Recipe
from engine.errors import CheckpointError
from engine.records import Method
from engine.storage import write_atomic

Arch = Literal["resnet18", "resnet50"]
Stem = Literal["standard", "cifar"]
ARCHS: tuple[str, ...] = get_args(Arch)
FORMAT = "mixmask-backbone-1"


class BackboneRecipe(Recipe):
    """Which trunk.

    ``stem: cifar`` is a 3×3 convolution of stride 1 without max-pooling, for images of about 32 pixels.
    ``zero_init_residual`` starts every residual branch at zero (arXiv:1706.02677, section 5.1).
    """

    arch: Arch = "resnet50"
    stem: Stem = "standard"
    zero_init_residual: bool = False


def build_trunk(recipe: BackboneRecipe, norm_layer: Callable[..., nn.Module] | None = None) -> nn.Module:
    """A freshly initialised trunk.

    Args:
        recipe: Architecture and stem.
        norm_layer: Replaces BatchNorm2d, for example by SplitBatchNorm2d.

    Returns:
        The trunk, with its feature width in ``trunk.num_features``. The weights come from torch's global generator.
    """
    build = getattr(torchvision.models, recipe.arch)
    trunk: Any = build(weights=None, norm_layer=norm_layer, zero_init_residual=recipe.zero_init_residual)
    trunk.num_features = trunk.fc.in_features
    trunk.fc = nn.Identity()
    if recipe.stem == "cifar":
        trunk.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
        trunk.maxpool = nn.Identity()
    built: nn.Module = trunk
    return built


class BackboneInfo(BaseModel):
    """Where a trunk comes from; stored as metadata in the file.

    ``lineage`` is the fingerprint without the seed: results of trunks that share it may be pooled into one mean.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arch: Arch
    stem: Stem
    framework: str
    method: Method
    fingerprint: str
    lineage: str
    dataset: str | None = None
    epochs: float | None = None
    seed: int | None = None

    @property
    def recipe(self) -> BackboneRecipe:
        """The recipe of the architecture."""
        return BackboneRecipe(arch=self.arch, stem=self.stem)


def save_backbone(path: Path, state: dict[str, Tensor], info: BackboneInfo) -> None:
    """Write ``backbone.safetensors`` whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    payload = save(tensors, metadata={"format": FORMAT, "info": info.model_dump_json()})
    write_atomic(path, lambda file: file.write(payload))


def is_backbone_file(path: Path) -> bool:
    """Whether the file is safetensors with this project's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("format") == FORMAT)
    except (SafetensorError, OSError):
        return False


def load_backbone(path: Path) -> tuple[dict[str, Tensor], BackboneInfo]:
    """Read a backbone file and check that it holds exactly the trunk it says.

    Raises:
        CheckpointError: If the file is missing, truncated, or its tensors do not fit its architecture.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such backbone file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: safetensors, but not a backbone of this project (no '{FORMAT}' metadata)")
        info = BackboneInfo.model_validate_json(metadata["info"])
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({str(error).splitlines()[0]})") from None
    check_trunk_state(state, info.recipe, str(path))
    return state, info


def check_trunk_state(state: dict[str, Tensor], recipe: BackboneRecipe, source: str) -> None:
    """Require exactly the tensors of a trunk, with their shapes.

    Raises:
        CheckpointError: With the first differences.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in build_trunk(recipe).state_dict().items()}
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        more = f" … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source}: not the trunk of a {recipe.arch} with {recipe.stem} stem: {'; '.join(problems[:5])}{more}"
        )
