"""Checkpoints as other projects write them, with their own classes."""

from __future__ import annotations

import collections
import datetime
import functools
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixmask.engine.backbones import BackboneRecipe, build_trunk, load_backbone
from mixmask.engine.errors import CheckpointError
from mixmask.transfer.checkpoints.names import COUNTER, to_detectron2
from mixmask.transfer.checkpoints.source import read_source
from tests.transfer.checkpoint_files import MLP, ONE, OPTIMIZER, save, sequential, under

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


@pytest.mark.slow
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
