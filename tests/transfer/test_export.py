"""Writing trunks for other libraries, and their names of tensors."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
import torchvision

from mixmask.engine.backbones import BackboneRecipe, build_trunk
from mixmask.engine.errors import CheckpointError
from mixmask.transfer.checkpoints.export import WRITERS, export
from mixmask.transfer.checkpoints.names import COUNTER, from_detectron2, to_detectron2
from mixmask.transfer.checkpoints.source import read_source
from tests.conftest import make_backbone


def test_detectron2_names_are_a_bijection_on_every_trunk() -> None:
    for arch in ("resnet18", "resnet50"):
        with torch.device("meta"):
            names = list(build_trunk(BackboneRecipe.model_validate({"arch": arch})).state_dict())
        theirs = [to_detectron2(name) for name in names]
        assert len(set(theirs)) == len(names)
        assert [from_detectron2(name) for name in theirs] == names


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer1.0.bn1.weight", "res2.0.conv1.norm.weight"),
        ("layer2.3.bn3.bias", "res3.3.conv3.norm.bias"),
        ("layer3.0.downsample.0.weight", "res4.0.shortcut.weight"),
        ("layer4.0.downsample.1.running_var", "res5.0.shortcut.norm.running_var"),
    ],
)
def test_detectron2_names(ours: str, theirs: str) -> None:
    assert to_detectron2(ours) == theirs
    assert from_detectron2(theirs) == ours


def test_names_that_are_not_a_trunks_are_refused() -> None:
    for name in ("fc.weight", "layer5.0.conv1.weight", "layer1.0.conv1"):
        with pytest.raises(KeyError):
            to_detectron2(name)
    for name in ("stem.fc.0.weight", "res1.0.conv1.weight"):
        with pytest.raises(KeyError):
            from_detectron2(name)


def test_a_resnet50_has_265_tensors_for_detectron2(resnet50: Path, tmp_path: Path) -> None:
    source = read_source(resnet50)
    message = export(source, tmp_path / "out.pkl", "detectron2")
    written = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert written["matching_heuristics"] is True
    assert len(written["model"]) == 265
    assert "265 tensors" in message
    assert "without 53 batch counters" in message
    for name, array in written["model"].items():
        assert torch.equal(torch.from_numpy(array), source.state[from_detectron2(name)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "suffix"),
    [
        ("torchvision", "pth"),
        ("torchvision", "safetensors"),
        ("timm", "safetensors"),
        ("detectron2", "pkl"),
        ("mixmask", "safetensors"),
    ],
)
def test_round_trips_are_exact(resnet50: Path, tmp_path: Path, target: str, suffix: str) -> None:
    source = read_source(resnet50)
    out = tmp_path / f"out.{suffix}"
    export(source, out, target)
    back = read_source(out)
    named = {"detectron2": "detectron2", "mixmask": "this project"}.get(target, "plain")
    assert back.tensor_report.layout.startswith(named)
    assert back.state.keys() == source.state.keys()
    for name in source.state:
        assert torch.equal(back.state[name], source.state[name]) or (target == "detectron2" and name.endswith(COUNTER))


def test_a_file_that_gives_other_features_is_not_written(
    resnet18: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_source(resnet18)
    monkeypatch.setattr(torchvision.models, "resnet18", torchvision.models.resnet34)
    with pytest.raises(RuntimeError, match="Missing key"):
        export(source, tmp_path / "out.pth", "torchvision")
    monkeypatch.undo()
    wrong = dataclasses.replace(source, state={name: tensor * 2 for name, tensor in source.state.items()})
    monkeypatch.setitem(WRITERS, "timm", lambda _, out: WRITERS["torchvision"](wrong, out))
    with pytest.raises(CheckpointError, match="gives other features than the source"):
        export(source, tmp_path / "out.safetensors", "timm")
    assert [path.name for path in tmp_path.iterdir()] == []
    assert "not verified" in export(source, tmp_path / "out.safetensors", "timm", verify=False)


def test_what_cannot_be_exported(resnet18: Path, tmp_path: Path) -> None:
    source = read_source(resnet18)
    with pytest.raises(CheckpointError, match=r"--to detectron2 writes \.pkl"):
        export(source, tmp_path / "x.pth", "detectron2")
    with pytest.raises(CheckpointError, match="is the source itself"):
        export(source, resnet18, "timm")
    cifar = read_source(make_backbone(tmp_path / "cifar.safetensors", stem="cifar"))
    with pytest.raises(CheckpointError, match="CIFAR stem"):
        export(cifar, tmp_path / "x.pkl", "detectron2")
    assert not (tmp_path / "x.pkl").exists()


def test_detectron2_loads_every_trunk_weight(resnet50: Path, tmp_path: Path) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 cannot be imported")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    source = read_source(resnet50)
    export(source, tmp_path / "trunk.pkl", "detectron2")
    config = get_cfg()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    config.MODEL.BACKBONE.FREEZE_AT = 0
    model = build_model(config)  # the default config is a C4 Faster R-CNN
    DetectionCheckpointer(model).load(str(tmp_path / "trunk.pkl"))
    theirs = model.state_dict()
    landed = 0
    for name, tensor in source.state.items():
        if name.endswith(COUNTER):
            continue
        wanted = to_detectron2(name)
        place = f"roi_heads.{wanted}" if wanted.startswith("res5") else f"backbone.{wanted}"
        assert torch.equal(theirs[place], tensor), place
        landed += 1
    assert landed == 265
