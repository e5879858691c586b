from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn

from mixmask.engine.backbones import (
    BackboneInfo,
    BackboneRecipe,
    build_trunk,
    load_backbone,
    replace_batch_norm,
    save_backbone,
)
from mixmask.engine.errors import ConfigError
from mixmask.pretrain.split_batch_norm import SplitBatchNorm2d


@pytest.mark.parametrize(
    ("arch", "width"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("resnet101", 2048)]
)
@pytest.mark.parametrize("stem", ["standard", "cifar"])
def test_resnets_have_torchvisions_names_and_their_width(arch: str, width: int, stem: str) -> None:
    recipe = BackboneRecipe.model_validate({"arch": arch, "stem": stem})
    with torch.device("meta"):
        trunk = build_trunk(recipe)
        theirs = getattr(torchvision.models, arch)()
    names = {name for name in theirs.state_dict() if not name.startswith("fc.")}
    assert set(trunk.state_dict()) == names
    assert trunk.num_features == width
    assert trunk.get_submodule("conv1").kernel_size == ((3, 3) if stem == "cifar" else (7, 7))


def test_cifar_stem_keeps_the_resolution() -> None:
    trunk = build_trunk(BackboneRecipe(arch="resnet18", stem="cifar")).eval()
    first = nn.Sequential(trunk.get_submodule("conv1"), trunk.get_submodule("maxpool"), trunk.get_submodule("layer1"))
    assert first(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert trunk(torch.zeros(2, 3, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize(
    "name", ["convnext_atto", "efficientnet_b0", "mobilenetv3_small_100", "resnet26", "regnetx_002"]
)
def test_timms_convnets_are_trunks(name: str, tmp_path: Path) -> None:
    recipe = BackboneRecipe(arch=f"timm/{name}")
    torch.manual_seed(0)
    trunk = build_trunk(recipe).eval()
    images = torch.randn(2, 3, 64, 64)
    features = trunk(images)
    assert features.shape == (2, trunk.num_features)
    info = BackboneInfo(
        arch=recipe.arch, stem="standard", framework="byol", method="vanilla", fingerprint="f", lineage="l"
    )
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, trunk.state_dict(), info)
    state, found = load_backbone(path)
    again = build_trunk(found.recipe).eval()
    again.load_state_dict(state)
    assert torch.equal(again(images), features)


def test_what_is_no_convnet_is_refused() -> None:
    with pytest.raises(ConfigError, match="has attention layers; the suite is for ConvNets"):
        build_trunk(BackboneRecipe(arch="timm/vit_tiny_patch16_224"))
    with pytest.raises(ValidationError, match="Did you mean 'timm/convnext_tiny'"):
        BackboneRecipe(arch="timm/convnext_tny")
    with pytest.raises(ValidationError, match=r"Did you mean 'resnet34'"):
        BackboneRecipe(arch="resnet_34")
    with pytest.raises(ValidationError, match="options of the ResNets"):
        BackboneRecipe(arch="timm/convnext_atto", stem="cifar")


def test_batch_norm_is_replaced_with_its_state_and_elsewhere_refused() -> None:
    trunk = build_trunk(BackboneRecipe(arch="resnet18"))
    state = {name: value.clone() for name, value in trunk.state_dict().items()}
    replace_batch_norm(trunk, lambda width: SplitBatchNorm2d(width, 2))
    assert sum(isinstance(module, SplitBatchNorm2d) for module in trunk.modules()) == 20
    assert not any(type(module) is nn.BatchNorm2d for module in trunk.modules())
    assert all(torch.equal(value, state[name]) for name, value in trunk.state_dict().items())
    with pytest.raises(ConfigError, match=r"set framework\.bn_splits=1"):
        replace_batch_norm(
            build_trunk(BackboneRecipe(arch="timm/efficientnet_b0")), lambda width: SplitBatchNorm2d(width, 2)
        )
