"""The Python API: its examples run, any network is taken, and its losses are those of the stage."""

from __future__ import annotations

import doctest
import inspect
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18 as torchvision_resnet18

import mixmask
from mixmask.api import backbones, evaluation, stages, tables
from mixmask.engine.builtin_configs import configs_folder
from mixmask.pretrain.frameworks.simsiam import SimSiamRecipe
from mixmask.pretrain.network import Framework
from mixmask.pretrain.step import step_terms


@pytest.mark.slow
def test_the_examples_in_the_documentation_run(shapes: Path, resnet18: Path, tmp_path: Path) -> None:
    from tests.evaluate.made import backbone, transfer, write

    write([transfer(backbone(), "knn", {"knn/top1": 45.0})], tmp_path / "some")
    names = {
        "mixmask": mixmask, "torch": torch, "photos": shapes, "backbone": resnet18, "folder": tmp_path,
        "demo": configs_folder() / "demo",
    }  # fmt: skip
    for module, fewest in ((backbones, 3), (evaluation, 4), (stages, 5), (tables, 1)):
        found = doctest.testmod(module, extraglobs=names)
        assert found.failed == 0
        assert found.attempted >= fewest


def test_everything_that_is_promised_is_there_and_importing_takes_no_torch() -> None:
    assert all(callable(getattr(mixmask, name)) for name in mixmask.__all__)
    with pytest.raises(AttributeError, match="no attribute 'kmm'; it has Features"):
        mixmask.kmm  # noqa: B018
    program = "import sys, mixmask; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


class Own(nn.Module):
    """Somebody's network: maps instead of features, in training mode, one layer frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.layers[0].weight.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.layers(images)
        return found


def test_any_network_is_measured_and_left_as_it_was(shapes: Path) -> None:
    model = Own().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert 0 <= mixmask.knn(model, shapes, resize=None, crop=32) <= 100
    assert 0 <= mixmask.linear_probe(model, shapes, epochs=1, resize=None, crop=32) <= 100
    assert mixmask.extract_features(model, shapes, split="val", resize=None, crop=32).values.shape == (40, 8)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_folder_of_classes_is_enough(shapes: Path) -> None:
    """The class folders alone: a part of every class is tested on."""
    assert 0 <= mixmask.knn(Own(), shapes / "train", resize=None, crop=32, k=3) <= 100


def test_mistakes_are_said(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(mixmask.UserError, match="k 500 is larger than the 120"):
        mixmask.knn(Own(), shapes, k=500, resize=None, crop=32)
    with pytest.raises(mixmask.UserError, match=r"gives \(2, 3, 64\)"):
        mixmask.knn(nn.Flatten(2), shapes, resize=None, crop=8)
    with pytest.raises(mixmask.UserError, match="no such checkpoint"):
        mixmask.load_backbone(tmp_path / "absent.pth")
    (tmp_path / "there.pth").touch()
    with pytest.raises(mixmask.UserError, match=r"there\.pth"):
        mixmask.convert(tmp_path / "x", tmp_path / "there.pth", to="torchvision")


def test_mistakes_of_stages_are_said(shapes: Path) -> None:
    no_model: Any = "moco.pth"
    with pytest.raises(mixmask.UserError, match=r"a torch\.nn\.Module was expected, got str; mixmask\.load_backbone"):
        mixmask.knn(no_model, shapes)
    with pytest.raises(mixmask.UserError, match=r"overrides: 'k=5' is one text; give a mapping"):
        mixmask.transfer("knn", "k=5")
    numbers: Any = [5]
    with pytest.raises(mixmask.UserError, match=r"texts such as 'epochs=10' were expected, got \[5\]"):
        mixmask.transfer("knn", numbers)
    with pytest.raises(mixmask.UserError, match=r"unknown key 'data\.rot'"):
        mixmask.transfer("knn", {"backbone": "x", "data": {"rot": 1}})
    with pytest.raises(mixmask.UserError, match=r"has no val/; holdout=0\.2"):
        mixmask.extract_features(Own(), shapes / "train", split="val")
    held = mixmask.extract_features(Own(), shapes / "train", split="val", holdout=0.2, resize=None, crop=32)
    assert len(held.paths) == 20


def test_what_is_odd_about_a_file_is_warned_of(tmp_path: Path) -> None:
    torch.save(torchvision_resnet18().state_dict(), tmp_path / "r18.pth")
    with pytest.warns(UserWarning, match=r"r18\.pth: 20 of 20 batch normalisations have the statistics of init"):
        mixmask.load_backbone(tmp_path / "r18.pth")


def test_help_and_signatures_show_the_stages() -> None:
    stage: Any = mixmask.pretrain
    assert [*inspect.signature(stage).parameters] == ["recipe", "overrides", "runs", "run_dir"]
    lines = str(mixmask.__doc__)
    assert all(re.search(rf"\b{name}\b", lines) for name in mixmask.__all__ if name != "Features")


def own_loop(framework: Framework, x1: Tensor, x2: Tensor, rng: random.Random) -> Tensor:
    """The paper's idea in anyone's loop, as the README has it: ``framework`` stands for an encoder and its loss."""
    clean: Any = framework.forward_views((x1, x2), (x1, x2), torch.Generator())
    total, k = clean.losses.mean(), clean.keys[0]
    for mixture in mixmask.draw_mixtures(mixmask.MixMask(grid=8), x1, rng):
        q_mix = framework.query(mixture.images)
        total = total + mixmask.mixture_loss(framework.loss(q_mix, k), framework.loss(q_mix, k[mixture.perm]), mixture)
    return total


def test_ten_lines_in_somebodys_loop_are_the_stages_own_step() -> None:
    from mixmask.engine.backbones import BackboneRecipe

    torch.manual_seed(0)
    framework = SimSiamRecipe(dim=16).build(BackboneRecipe(arch="resnet18")).eval()
    x1, x2 = torch.randn(2, 4, 3, 32, 32).unbind(0)
    ours = step_terms(framework, mixmask.MixMask(grid=8), [x1, x2], random.Random(7), torch.Generator())
    with torch.no_grad():
        expected = sum(float(term.loss) * term.weight for term in ours)
        assert float(own_loop(framework, x1, x2, random.Random(7))) == pytest.approx(expected, abs=1e-6)
