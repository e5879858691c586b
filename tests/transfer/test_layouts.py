"""Recognising checkpoints, and the report on their tensors."""

from __future__ import annotations

import collections
import datetime
import functools
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from mixmask.engine.backbones import BackboneRecipe, build_trunk, load_backbone
from mixmask.engine.errors import CheckpointError
from mixmask.transfer.checkpoints.export import export
from mixmask.transfer.checkpoints.names import COUNTER, to_detectron2
from mixmask.transfer.checkpoints.safe_read import read_tensors
from mixmask.transfer.checkpoints.source import inspect, read_source
from mixmask.transfer.checkpoints.tensor_report import Reading
from tests.transfer.checkpoint_files import MLP, ONE, OPTIMIZER, in_the_wild, moco_checkpoint, save, sequential, under


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
def test_every_layout_is_recognised_and_accounted_for(resnet50: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet50)
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
        assert source.info.arch == "resnet50"
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


# --- files as other projects write them, with their own classes --------------------------------------------------------


def _class(full: str, base: type = object) -> type:
    """A class of another project, by its name, so that it can be pickled here."""
    module, _, name = full.rpartition(".")
    made = type(name, (base,), {"__module__": module})
    for depth in range(1, module.count(".") + 2):
        part = ".".join(module.split(".")[:depth])
        sys.modules.setdefault(part, types.ModuleType(part))
    setattr(sys.modules[module], name, made)
    return made


def _with_objects(state: dict[str, Tensor]) -> dict[str, tuple[str, Any]]:
    config, node = _class("omegaconf_like.dictconfig.DictConfig"), _class("omegaconf_like.base.Metadata")
    made, metadata = config(), node()
    metadata.__dict__.update(element_type=Any, key_type=dict, ref_type=list, other=collections.defaultdict(list))
    made.__dict__.update(_metadata=metadata, _content={"lr": 0.1})
    history = _class("mmengine_like.logging.HistoryBuffer")()
    history.__dict__.update(_log_history=np.arange(3.0), _statistics_methods={"min": min, "max": max})
    attributes = _class("lightning_like.AttributeDict", dict)(lr=0.3)
    module = {"state_dict": under("backbone.", state) | under("projector.", MLP), "epoch": 3}
    return {
        "omegaconf": ("solo-learn", {**module, "hyper_parameters": {"cfg": made, "kinds": [dict, list, int, Any]}}),
        "partial": (
            "solo-learn",
            {
                **module,
                "hyper_parameters": {"opt": functools.partial(torch.optim.SGD, lr=1), "kind": torch.optim.AdamW},
            },
        ),
        "attributes": ("solo-learn", {**module, "hyper_parameters": attributes}),
        "class as a key": ("solo-learn", {**module, "callbacks": {_class("theirs.Callback"): {"best": ONE}}}),
        "dates": (
            "solo-learn",
            {**module, "hyper_parameters": {"when": datetime.datetime(2026, 1, 2), "at": Path("/x")}},
        ),
        "scheduler": (
            "solo-learn",
            {
                **module,
                "lr_schedulers": [torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(ONE)], lr=1), 3)],
            },
        ),
        "history": (
            "openmmlab",
            {
                "meta": {"time": "x"},
                "state_dict": under("backbone.", state) | under("neck.mlp.", MLP) | under("encoder_k.module.0.", state),
                "message_hub": {"log_scalars": {"train/lr": history}},
            },
        ),
    }


def _other_names(state: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name to (layout, content) of files in which only names are special."""
    blocks = {name.replace("layer1.0.", "layer1._checkpoint_wrapped_module.0."): value for name, value in state.items()}
    return {
        "old byol": (
            "openmmlab",
            {
                "state_dict": under("online_net.0.", state)
                | under("online_net.1.", MLP)
                | under("backbone.", state)
                | under("target_net.0.", other)
                | under("neck.", MLP)
                | under("head.predictor.", MLP)
            },
        ),
        "lightly dino": (
            "lightly-dino",
            under("teacher_backbone.", sequential(state, (0, 1, 4, 5, 6, 7)))
            | under("student_backbone.", sequential(other, (0, 1, 4, 5, 6, 7)))
            | under("student_head.", MLP)
            | under("teacher_head.", MLP),
        ),
        "lightly dino of its benchmark": (
            "lightly-dino",
            {
                "state_dict": under("backbone.", state)
                | under("student_backbone.", other)
                | under("projection_head.", MLP)
                | under("student_projection_head.", MLP)
            },
        ),
        "stable-pretraining": (
            "stable-pretraining",
            {
                "state_dict": under("backbone.teacher.", state)
                | under("backbone.student.", other)
                | {"backbone.ema_coefficient": ONE}
                | under("projector.teacher.", MLP)
                | under("projector.student.", MLP)
            },
        ),
        "lucidrains": (
            "lucidrains-byol",
            under("net.", state)
            | under("online_encoder.net.", state)
            | under("online_encoder.projector.", MLP)
            | under("target_encoder.net.", other)
            | under("online_predictor.", MLP),
        ),
        "averaged model": ("plain", {**under("module.", state), "n_averaged": torch.tensor(3)}),
        "deepspeed": ("solo-learn", {"state_dict": under("_forward_module.backbone.", state)}),
        "activation checkpoints": ("solo-learn", {"state_dict": under("backbone.", blocks)}),
        "compiled within": ("solo-learn", {"state_dict": under("backbone._orig_mod.", state)}),
        "fsdp": ("plain", {"model": under("_fsdp_wrapped_module.", state)}),
        "ema_pytorch": ("ema-pytorch", {**under("ema_model.", state), **under("online_model.", other), "step": ONE}),
        "random states": (
            "plain",
            {"model": state, "torch_rng": ONE, "np_rng": ("x", np.arange(3)), "cuda_rng": [ONE]},
        ),
        "composer": ("plain", {"state": {"model": under("module.", state), "optimizers": {"SGD": OPTIMIZER}}}),
        "averaged alone": ("averaged", {"state_dict_ema": state}),
        "a detector with a pyramid": (
            "detectron2",
            {
                "model": {
                    f"backbone.bottom_up.{to_detectron2(name)}": value
                    for name, value in state.items()
                    if not name.endswith(COUNTER)
                }
                | {"backbone.fpn_lateral2.weight": ONE, "proposal_generator.x": ONE}
            },
        ),
    }


def test_files_of_other_projects_with_their_classes_are_read(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    for name, (layout, content) in _with_objects(state).items():
        source = read_source(save(tmp_path, content))
        assert source.tensor_report.layout.startswith(f"{layout}: "), name
        assert all(torch.equal(source.state[key], state[key]) for key in state), name
        assert any(note.startswith("not made") for note in source.tensor_report.notes) or name == "dates", name


@pytest.mark.slow
def test_files_of_other_projects_with_other_names_are_read(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for name, (layout, content) in _other_names(state, other).items():
        source = read_source(save(tmp_path, content))
        assert source.tensor_report.layout.startswith(f"{layout}: "), (name, source.tensor_report.layout)
        assert all(torch.equal(source.state[k], state[k]) for k in state if not k.endswith(COUNTER)), name


def test_a_name_that_should_be_the_same_tensor_is_compared(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    other = {name: tensor + 1 for name, tensor in state.items()}
    with pytest.raises(
        CheckpointError, match=r"should be one tensor under two names, but differ; choose with --prefix"
    ):
        read_source(save(tmp_path, under("net.", state) | under("online_encoder.net.", other)))


def test_tensors_in_an_unknown_object_are_not_passed_over(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    holder = _class("theirs.Holder")()
    holder.__dict__["tensors"] = state
    for content in ({"model": holder}, {"state_dict": {**state, "extra": holder}}):
        with pytest.raises(
            CheckpointError, match=r"refused: \S+ is an object of the class theirs\.Holder that holds tensors"
        ):
            read_source(save(tmp_path, content))
    filled = _class("theirs.Dict", dict)(state)
    assert len(read_source(save(tmp_path, {"state_dict": filled})).tensor_report.used) == len(state)


ADVICE = {
    "caffe2": (
        {"conv1_w": torch.zeros(64, 3, 7, 7), "res2_0_branch2a_w": ONE},
        "Caffe2's names.*BGR.*is not converted",
    ),
    "transformer": ({"cls_token": ONE, "blocks.0.attn.qkv.weight": ONE}, "is a transformer, by model.cls_token"),
    "deep stem": (
        {"conv1.0.weight": torch.zeros(32, 3, 3, 3), "layer1.0.conv1.weight": ONE},
        "variant.*--arch timm/NAME",
    ),
    "convnext": ({"stem.0.weight": ONE, "stages.0.blocks.0.conv_dw.weight": ONE}, "ConvNeXt.*--arch timm/NAME"),
}


@pytest.mark.parametrize("kind", ADVICE)
def test_advice_fits(kind: str, tmp_path: Path) -> None:
    content, said = ADVICE[kind]
    with pytest.raises(CheckpointError, match=said) as caught:
        read_source(save(tmp_path, {"model": content}))
    assert "first convolution" not in str(caught.value)


def test_a_resnet_of_transformers_is_read(tmp_path: Path) -> None:
    """The names of its tensors, one for one."""
    state = build_trunk(BackboneRecipe(arch="resnet50")).state_dict()
    theirs = {}
    for name, value in state.items():
        part = re.fullmatch(r"layer([1-4])\.(\d+)\.(conv|bn|downsample\.)(\d)\.(\w+)", name)
        if part is None:
            kind = "convolution" if name.startswith("conv1") else "normalization"
            theirs[f"embedder.embedder.{kind}.{name.split('.')[1]}"] = value
            continue
        stage, block, kind, number, leaf = part.groups()
        norm = kind == "bn" or (kind == "downsample." and number == "1")
        where = "shortcut" if kind == "downsample." else f"layer.{int(number) - 1}"
        theirs[
            f"encoder.stages.{int(stage) - 1}.layers.{block}.{where}.{'normalization' if norm else 'convolution'}.{leaf}"
        ] = value
    source = read_source(save(tmp_path, {**under("resnet.", theirs), "classifier.1.weight": ONE}))
    assert source.tensor_report.layout.startswith("transformers: ")
    assert all(torch.equal(source.state[name], state[name]) for name in state)
