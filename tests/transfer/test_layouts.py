"""Recognising checkpoints, and the report on their tensors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torchvision

from mixmask.engine.backbones import BackboneRecipe, build_trunk, load_backbone
from mixmask.engine.errors import CheckpointError
from mixmask.transfer.checkpoints.export import export
from mixmask.transfer.checkpoints.names import COUNTER, to_detectron2
from mixmask.transfer.checkpoints.safe_read import read_tensors
from mixmask.transfer.checkpoints.source import inspect, read_source
from mixmask.transfer.checkpoints.tensor_report import Reading
from tests.transfer.checkpoint_files import ONE, in_the_wild, moco_checkpoint, save, under


def test_a_moco_checkpoint_is_accounted_for_tensor_by_tensor(resnet50: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet50)
    source = read_source(moco_checkpoint(tmp_path / "checkpoint_0199.pth.tar", state))
    assert source.info.framework == "mocov2"
    assert source.info.arch == "resnet50"
    assert all(torch.equal(source.state[name], state[name]) for name in state)
    tensor_report = source.tensor_report
    assert sum(1 for name in tensor_report.used.values() if not name.endswith(COUNTER)) == 265
    assert len(tensor_report.used) + len(tensor_report.left_out) == 2 * (len(state) + 4) + 2
    assert set(tensor_report.left_out.values()) == {"head", "momentum or averaged copy", "queue of negatives"}
    assert "265 tensors, and 53 batch counters" in tensor_report.summary()


def test_missing_counters_are_filled_and_said(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    torch.save({name: value for name, value in state.items() if not name.endswith(COUNTER)}, tmp_path / "old.pth")
    source = read_source(tmp_path / "old.pth")
    assert len(source.tensor_report.filled) == 20
    assert "filled    20 batch counters" in source.tensor_report.summary()


@pytest.mark.slow
def test_what_is_refused(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    missing = {name: value for name, value in state.items() if name != "layer3.1.conv2.weight"}
    with pytest.raises(CheckpointError, match=r"closest is resnet18, with missing \['layer3\.1\.conv2\.weight'\]"):
        read_source(save(tmp_path, missing))
    with pytest.raises(CheckpointError, match=r"does not explain: decoder\.weight$"):
        read_source(save(tmp_path, {**state, "decoder.weight": torch.zeros(1)}))
    with pytest.raises(
        CheckpointError, match=r"closest is resnet18, with missing \[\] and unexpected \['layer1\.2\.x'\]"
    ):
        read_source(save(tmp_path, {**state, "layer1.2.x": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\.weight has shape \(1,\)"):
        read_source(save(tmp_path, {**state, "layer1.0.conv1.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"not finite in bn1\.weight"):
        read_source(save(tmp_path, {**state, "bn1.weight": torch.full((64,), float("nan"))}))
    with pytest.raises(CheckpointError, match=r"unknown layout.* stands behind 'a\.b\.'"):
        read_source(save(tmp_path, {f"a.b.{name}": value for name, value in state.items()}))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_source(save(tmp_path, {"epoch": 3}))
    with pytest.raises(CheckpointError, match=r"no floating-point numbers: bn1\.bias \(int64\), bn1\."):
        read_source(save(tmp_path, {n: t.long() for n, t in state.items()}))
    vit = torchvision.models.vit_b_32(weights=None, image_size=32).state_dict()
    with pytest.raises(CheckpointError, match=r"is a transformer, by encoder\.pos_embedding"):
        read_source(save(tmp_path, vit))
    other = moco_checkpoint(tmp_path / "m.pth", state, **{"module.decoder": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"does not explain: state_dict\.module\.decoder"):
        read_source(other)


def test_other_number_formats_and_memory_layouts_are_read(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    odd = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in state.items()}
    odd = {n: t.bfloat16() if t.is_floating_point() else t for n, t in odd.items()}
    source = read_source(save(tmp_path, odd))
    export(source, tmp_path / "out.pkl", "detectron2")
    export(source, tmp_path / "out.safetensors", "timm")
    for keys in ({1: torch.zeros(1)}, {"state_dict": {**state, 3: torch.zeros(1)}}):
        with pytest.raises(CheckpointError, match=r"unknown layout|does not explain: state_dict\.3"):
            read_source(save(tmp_path, keys))


@pytest.mark.slow
def test_every_layout_is_recognised_and_accounted_for(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    for name, (layout, framework, content) in in_the_wild(state).items():
        path = tmp_path / name
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
        source = read_source(path)
        tensor_report = source.tensor_report
        assert tensor_report.layout.startswith(f"{layout}: "), (name, tensor_report.layout)
        assert source.info.framework == framework, name
        assert source.info.arch == "resnet18"
        assert bool(tensor_report.warnings) == (layout == "detectron2")
        for key in state:
            if not key.endswith(COUNTER):
                assert torch.equal(source.state[key], state[key]), (name, key)
        assert len(tensor_report.used) + len(tensor_report.left_out) == len(read_tensors(path).tensors), name
        assert not tensor_report.used.keys() & tensor_report.left_out.keys()
        text, problem = inspect(path, every=True)
        assert problem is None
        assert all(f"  {whole}  " in text for whole in tensor_report.used)
        path.unlink()


def test_what_the_keys_cannot_tell(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    path = save(tmp_path, {**under("a.net.", state), **under("b.net.", other), "c.weight": ONE})
    with pytest.raises(
        CheckpointError, match=r"unknown layout.*behind 'a\.net\.', 'b\.net\.'\. `mixmask convert .* --prefix PREFIX"
    ):
        read_source(path)
    text, problem = inspect(path)
    assert problem is not None
    assert "a.net.conv1.weight" in text
    source = read_source(path, Reading(prefix="a.net."))
    assert all(torch.equal(source.state[name], state[name]) for name in state)
    assert set(source.tensor_report.left_out.values()) == {"outside the given prefix"}
    assert len(source.tensor_report.left_out) == len(state) + 1
    with pytest.raises(CheckpointError, match=r"no first convolution .* behind the prefix 'a\.': there stand net\.bn1"):
        read_source(path, Reading(prefix="a."))
    with pytest.raises(CheckpointError, match=r"--as moko: valid: .*Did you mean 'moco'"):
        read_source(path, Reading(layout="moko"))
    with pytest.raises(CheckpointError, match="the layout 'moco' does not fit"):
        read_source(path, Reading(layout="moco"))
    path = save(tmp_path, {"state_dict": under("module.encoder.", state)})  # SimSiam's, without its predictor
    assert read_source(path, Reading(layout="simsiam")).info.framework == "simsiam"
    two = {**under("online_network.encoder.", state), **under("online_network.net.", state)}
    with pytest.raises(CheckpointError, match="fits in more than one place"):
        read_source(save(tmp_path, two))


@pytest.mark.slow
def test_a_network_of_timm_is_read_when_it_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = build_trunk(BackboneRecipe(arch="timm/convnext_atto")).state_dict()
    content = {"state_dict": {**under("module.", state), "module.head.fc.weight": ONE}}
    with pytest.raises(CheckpointError, match=r"is no ResNet of torchvision: .* --arch timm/NAME"):
        read_source(save(tmp_path, content))
    source = read_source(save(tmp_path, content), Reading(arch="timm/convnext_atto"))
    assert set(source.tensor_report.left_out.values()) == {"head"}
    said = export(source, tmp_path / "own.safetensors", "mixmask")
    assert "same features" in said
    back = read_source(tmp_path / "own.safetensors")
    assert back.info == source.info
    assert all(torch.equal(back.state[name], state[name]) for name in state)
    assert "timm's convnext_atto loads them" in export(source, tmp_path / "timm.safetensors", "timm")
    with pytest.raises(
        CheckpointError, match=r"--arch: arch: timm has no model 'convnext_ato'\. Did you mean 'timm/convnext_atto'"
    ):
        read_source(save(tmp_path, content), Reading(arch="timm/convnext_ato"))


def test_statistics_of_a_network_that_never_trained_are_warned_of(tmp_path: Path) -> None:
    fresh = build_trunk(BackboneRecipe(arch="resnet18")).state_dict()
    (warning,) = read_source(save(tmp_path, fresh)).tensor_report.warnings
    assert "20 of 20 batch normalisations have the statistics of initialisation (bn1, layer1.0.bn1 …" in warning


def test_two_networks_of_one_file_are_two(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    path = moco_checkpoint(tmp_path / "m.pth", state)
    query, key = (read_source(path, Reading(prefix=f"state_dict.module.encoder_{which}.")) for which in "qk")
    assert query.info.fingerprint != key.info.fingerprint
    assert read_source(path).info.fingerprint == query.info.fingerprint
    assert not query.labelled


def test_two_sources_for_one_tensor_are_refused(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    theirs = {f"backbone.{to_detectron2(name)}": tensor for name, tensor in state.items() if not name.endswith(COUNTER)}
    theirs["roi_heads.res5.0.conv1.weight"] = torch.zeros_like(state["layer4.0.conv1.weight"])
    with pytest.raises(CheckpointError, match=r"1 trunk tensors have two sources each, for example .*roi_heads\.res5"):
        read_source(save(tmp_path, {"model": theirs}))
    with pytest.raises(CheckpointError, match="the same path through its containers"):
        read_source(save(tmp_path, {"a": {"b": ONE}, "a.b": ONE}))


def test_detectron2_files_with_batch_counters_are_read(resnet18: Path, tmp_path: Path) -> None:
    """MoCo's converter keeps them, as arrays without dimensions."""
    state, _ = load_backbone(resnet18)
    model = {to_detectron2(name): tensor.numpy() for name, tensor in state.items()}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "MOCO"}))
    source = read_source(tmp_path / "x.pkl")
    assert all(torch.equal(source.state[name], state[name]) for name in state)
    assert not source.tensor_report.filled
