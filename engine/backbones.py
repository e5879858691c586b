"""Backbones: torchvision's ResNets, timm's ConvNets, and the file format in which a trunk is saved.

A trunk is a network without its classifier: images (N, 3, H, W) in, features (N, num_features) out. The keys of a
ResNet's state dict are torchvision's (``conv1.weight`` … ``layer4.2.bn3.running_var``), those of a timm trunk are
timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from safetensors import SafetensorError, safe_open

from mixmask.engine.config import Recipe, added
from mixmask.engine.errors import CheckpointError, ConfigError
from mixmask.engine.head_info import HeadInfo
from mixmask.engine.late import torch, torchvision
from mixmask.engine.normalization import Normalization
from mixmask.engine.records import Fingerprint, Label, Method, check_recipe_shape
from mixmask.engine.storage import write_atomic
from mixmask.engine.wording import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

Stem = Literal["standard", "cifar"]
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
TIMM = "timm/"
FORMAT = "mixmask-backbone-1"
HEAD = "projection_head."  # prefix of the projection head's tensors in a backbone file


def _known_arch(arch: str) -> str:
    if arch in RESNETS:
        return arch
    if arch.startswith(TIMM):
        import timm  # takes a second, and only its users need it

        name = arch.removeprefix(TIMM)
        if timm.is_model(name):
            return arch
        hint = did_you_mean(arch, (f"{TIMM}{model}" for model in timm.list_models()), most=3)
        raise ValueError(f"timm has no model '{name}'. {hint}".rstrip())
    hint = did_you_mean(arch, RESNETS)
    raise ValueError(f"valid: {', '.join(RESNETS)}, or timm/ and the name of one of timm's ConvNets. {hint}".rstrip())


Arch = Annotated[str, AfterValidator(_known_arch)]


class BackboneRecipe(Recipe):
    """The architecture of the trunk: a ResNet, or ``timm/`` and the name of a timm ConvNet (``timm/convnext_tiny``).

    ``stem: cifar`` is a 3×3 convolution of stride 1 without max-pooling, for images of about 32 pixels.
    ``zero_init_residual`` starts every residual branch at zero (arXiv:1706.02677, section 5.1). Both are for ResNets.

    ``in_channels`` is 3 for RGB and 1 for grey images; images are decoded to it. With any other number, images must have as
    many channels themselves (4 of PNG and TIFF, any number of .npy arrays). Networks that do not take RGB can be
    pretrained without hue, saturation and greyscale, and measured by the protocols on whole images; detection,
    segmentation, robustness and the formats of other libraries need RGB.
    """

    arch: Arch = "resnet50"
    stem: Stem = "standard"
    zero_init_residual: bool = False
    in_channels: int = added(3, ge=1, le=1024)

    @model_validator(mode="after")
    def _resnet_options(self) -> BackboneRecipe:
        if self.arch.startswith(TIMM) and (self.stem != "standard" or self.zero_init_residual):
            raise ValueError(
                f"stem and zero_init_residual are options of the ResNets, not of {self.arch}: "
                f"set backbone.stem=standard backbone.zero_init_residual=false"
            )
        return self


def build_trunk(recipe: BackboneRecipe) -> nn.Module:
    """A freshly initialised trunk.

    Returns:
        The trunk, with its feature width in ``trunk.num_features``. Weights are drawn from torch's global generator.

    Raises:
        ConfigError: If the timm model is not a ConvNet.
    """
    trunk: Any = _timm_trunk(recipe) if recipe.arch.startswith(TIMM) else _resnet_trunk(recipe)
    trunk.image_channels = recipe.in_channels
    built: nn.Module = trunk
    return built


def _resnet_trunk(recipe: BackboneRecipe) -> nn.Module:
    build = getattr(torchvision.models, recipe.arch)
    trunk: Any = build(weights=None, zero_init_residual=recipe.zero_init_residual)
    trunk.num_features = trunk.fc.in_features
    trunk.fc = torch.nn.Identity()
    if recipe.stem == "cifar":
        trunk.conv1 = torch.nn.Conv2d(recipe.in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        torch.nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
        trunk.maxpool = torch.nn.Identity()
    elif recipe.in_channels != 3:
        trunk.conv1 = torch.nn.Conv2d(recipe.in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        torch.nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
    built: nn.Module = trunk
    return built


def _timm_trunk(recipe: BackboneRecipe) -> nn.Module:
    import timm

    arch = recipe.arch
    other = {} if recipe.in_channels == 3 else {"in_chans": recipe.in_channels}  # not every model of timm knows the key
    trunk: Any = timm.create_model(arch.removeprefix(TIMM), pretrained=False, num_classes=0, **other)
    layers = {type(module).__name__.lower() for module in trunk.modules()}
    if any("attention" in layer or "crosscovariance" in layer for layer in layers):
        raise ConfigError(f"backbone.arch: {arch} has attention layers; the suite is for ConvNets")
    # Some timm models (MobileNetV3) keep a layer after pooling even without classes; the output then has its width.
    trunk.num_features = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    built: nn.Module = trunk
    return built


def map_and_features(trunk: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """A trunk's last map (N, C, H, W), and its features (N, D), which are what calling it gives."""
    network: Any = trunk
    if hasattr(network, "forward_features"):  # timm's
        last = network.forward_features(images)
        return last, network.forward_head(last, pre_logits=True)
    last = images
    for name, layer in network.named_children():
        if name == "avgpool":
            break
        last = layer(last)
    return last, network.fc(torch.flatten(network.avgpool(last), 1))


def channels_of(network: nn.Module) -> int:
    """Channels of the images that a network takes: what `build_trunk` has noted on its trunk; else 3."""
    noted: list[Any] = [module.image_channels for module in network.modules() if hasattr(module, "image_channels")]
    return int(noted[0]) if noted else 3


def width_of(trunk: nn.Module) -> int:
    """Feature dimension of a trunk's output."""
    width = trunk.num_features
    assert isinstance(width, int)
    return width


def replace_batch_norm(module: nn.Module, build: Callable[[int], nn.BatchNorm2d]) -> None:
    """Replace every BatchNorm2d in place by ``build(num_features)``, keeping weights, statistics, eps and momentum.

    Raises:
        ConfigError: If the network fuses batch normalisation with an activation, which cannot be replaced.
    """
    for name, child in module.named_children():
        if type(child) is torch.nn.BatchNorm2d:
            other = build(child.num_features)
            other.eps, other.momentum = child.eps, child.momentum
            other.load_state_dict(child.state_dict())
            setattr(module, name, other)
        elif isinstance(child, torch.nn.BatchNorm2d):
            raise ConfigError(
                f"this backbone's {type(child).__name__} cannot be split into groups: set framework.bn_splits=1"
            )
        else:
            replace_batch_norm(child, build)


class BackboneInfo(BaseModel):
    """The origin of a trunk, stored as metadata in its file.

    ``lineage`` is the fingerprint without the seed: results of trunks that share it may be pooled into one mean.
    ``pretraining`` is the recipe (`engine.config.identity`), so that a result can say what was pretrained and how.
    ``head`` describes the projection head if the file holds it. ``normalization`` names the data set whose mean and
    standard deviation the images were normalised with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arch: Arch
    stem: Stem
    framework: Label
    method: Method
    fingerprint: Fingerprint
    lineage: Fingerprint
    dataset: Label | None = None
    epochs: float | None = Field(None, ge=0, le=1e9, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    pretraining: dict[str, Any] = {}
    normalization: Normalization = "imagenet"
    head: HeadInfo | None = None
    in_channels: int = Field(3, ge=1, le=1024)

    _pretraining = field_validator("pretraining")(check_recipe_shape)

    @property
    def recipe(self) -> BackboneRecipe:
        """The `BackboneRecipe` that builds this architecture."""
        return BackboneRecipe(arch=self.arch, stem=self.stem, in_channels=self.in_channels)


def save_backbone(
    path: Path, state: Mapping[str, Tensor], info: BackboneInfo, head: Mapping[str, Tensor] | None = None
) -> None:
    """Write ``backbone.safetensors`` atomically; ``head`` holds the tensors that ``info.head`` describes."""
    write_atomic(path, lambda file: file.write(backbone_bytes(state, info, head)))


def backbone_bytes(state: Mapping[str, Tensor], info: BackboneInfo, head: Mapping[str, Tensor] | None = None) -> bytes:
    """Serialise a trunk, its head if given, and ``info`` as safetensors."""
    every = {**state, **{f"{HEAD}{name}": tensor for name, tensor in (head or {}).items()}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in every.items()}
    # Left out for RGB, so that earlier versions read the file, too.
    text = info.model_dump_json(exclude={"in_channels"} if info.in_channels == 3 else None)
    from safetensors.torch import save

    return save(tensors, metadata={"format": FORMAT, "info": text})


def is_backbone_file(path: Path) -> bool:
    """Whether the file is safetensors with this project's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("format") == FORMAT)
    except (SafetensorError, OSError):
        return False


def load_backbone(path: Path) -> tuple[dict[str, Tensor], BackboneInfo]:
    """Read the trunk and its info from a backbone file; see `load_backbone_and_head`."""
    state, _, info = load_backbone_and_head(path)
    return state, info


def load_backbone_and_head(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], BackboneInfo]:
    """Read a backbone file and check that it holds exactly the tensors that its metadata describes.

    Returns:
        The trunk's tensors, the head's tensors (empty if the file has no head), and the metadata.

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
    head = {name.removeprefix(HEAD): state.pop(name) for name in list(state) if name.startswith(HEAD)}
    check_trunk_state(state, info.recipe, str(path))
    _check_head(head, info.head, path)
    return state, head, info


def _check_head(head: dict[str, Tensor], info: HeadInfo | None, path: Path) -> None:
    from mixmask.engine.heads import Head

    with torch.device("meta"):
        expected = {} if info is None else {name: t.shape for name, t in Head(info).state_dict().items()}
    if {name: tensor.shape for name, tensor in head.items()} != expected:
        raise CheckpointError(
            f"{path}: its projection head is damaged: it holds {', '.join(head) or 'no tensors'}, and its metadata "
            f"describes {', '.join(expected) or 'none'}"
        )


def check_trunk_state(state: dict[str, Tensor], recipe: BackboneRecipe, source: str) -> None:
    """Require exactly the tensors of a trunk, with their shapes.

    Raises:
        CheckpointError: If any differ; lists the first five.
    """
    # Only names and shapes are needed: the meta device takes no memory and draws no weights.
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
            f"{source}: not the trunk of a {recipe.arch} with {recipe.stem} stem"
            + f" for {recipe.in_channels} channels" * (recipe.in_channels != 3)
            + f": {'; '.join(problems[:5])}{more}"
        )
