from __future__ import annotations

import dataclasses
import os
import pickle
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from engine.backbones import BackboneRecipe, build_trunk, load_backbone
from engine.errors import CheckpointError
from tests.conftest import make_backbone
from transfer.checkpoints.export import WRITERS, export
from transfer.checkpoints.names import COUNTER, from_detectron2, to_detectron2
from transfer.checkpoints.safe_read import read_tensors
from transfer.checkpoints.source import Reading, _tensors, inspect, read_source


def moco_checkpoint(path: Path, state: dict[str, Tensor], **extra: Tensor) -> Path:
    """The layout that MoCo's main_moco.py writes: query and key encoder, two-layer heads, queue, optimizer."""
    tensors = {}
    for encoder in ("encoder_q", "encoder_k"):
        tensors.update({f"module.{encoder}.{name}": value for name, value in state.items()})
        for layer in (0, 2):
            tensors[f"module.{encoder}.fc.{layer}.weight"] = torch.zeros(2, 2)
            tensors[f"module.{encoder}.fc.{layer}.bias"] = torch.zeros(2)
    tensors.update({"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}, **extra)
    optimizer = {"state": {}, "param_groups": [{"lr": 0.03}]}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": tensors, "optimizer": optimizer}, path)
    return path


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
    assert back.account.layout.startswith(named)
    assert back.state.keys() == source.state.keys()
    for name in source.state:
        assert torch.equal(back.state[name], source.state[name]) or (target == "detectron2" and name.endswith(COUNTER))


def test_a_moco_checkpoint_is_accounted_for_tensor_by_tensor(resnet50: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet50)
    source = read_source(moco_checkpoint(tmp_path / "checkpoint_0199.pth.tar", state))
    assert source.info.framework == "mocov2"
    assert source.info.arch == "resnet50"
    assert all(torch.equal(source.state[name], state[name]) for name in state)
    account = source.account
    assert sum(1 for name in account.used.values() if not name.endswith(COUNTER)) == 265
    assert len(account.used) + len(account.left_out) == 2 * (len(state) + 4) + 2
    assert set(account.left_out.values()) == {"head", "momentum or averaged copy", "queue of negatives"}
    assert "265 tensors, and 53 batch counters" in account.summary()


def test_missing_counters_are_filled_and_said(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    torch.save({name: value for name, value in state.items() if not name.endswith(COUNTER)}, tmp_path / "old.pth")
    source = read_source(tmp_path / "old.pth")
    assert len(source.account.filled) == 20
    assert "filled    20 batch counters" in source.account.summary()


def save(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "x.pth")
    return tmp_path / "x.pth"


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
    vit = torchvision.models.vit_b_32(weights=None, image_size=32).state_dict()
    with pytest.raises(CheckpointError, match="unknown layout"):
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


def test_damaged_files_are_named(resnet18: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        read_source(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_source(tmp_path)
    whole = save(tmp_path, load_backbone(resnet18)[0]).read_bytes()
    for name, content in (("half.pth", whole[: len(whole) // 2]), ("empty.pth", b""), ("text.pth", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_source(tmp_path / name)
    for name in ("backbone.safetensors", "other.safetensors"):
        (tmp_path / name).write_bytes(resnet18.read_bytes()[:5000])
        with pytest.raises(CheckpointError, match=f"{name}: truncated"):
            read_source(tmp_path / name)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (os.system, ("touch /tmp/mixmask-was-here",))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused_by_name(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"model": Hostile()}))
    else:
        torch.save({"state_dict": Hostile()}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"refused, it holds more than tensors.*: (posix|os)\.system"):
        read_source(path)
    assert not Path("/tmp/mixmask-was-here").exists()


def test_a_hostile_function_of_numpy_is_refused(tmp_path: Path) -> None:
    class Loads:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (np.loadtxt, ("/etc/hostname",))

    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": Loads()}))
    with pytest.raises(CheckpointError, match=r"refused.*: numpy\S*\.loadtxt"):
        read_source(tmp_path / "x.pkl")


def test_settings_beside_the_tensors_do_no_harm(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    content = {"state_dict": state, "args": Namespace(lr=0.1), "best": np.float64(3.5), "where": tmp_path, "epoch": 3}
    for legacy in (False, True):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        assert len(read_source(tmp_path / "x.pth").account.used) == len(state)


def test_large_files_are_mapped(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    torch.save({"state_dict": state, "optimizer": {"state": [torch.zeros(10_000_000)]}}, tmp_path / "big.pth")
    save_file(state, tmp_path / "big.safetensors")
    for name in ("big.pth", "big.safetensors"):
        content = read_tensors(tmp_path / name)
        assert name in Path("/proc/self/maps").read_text()
        del content


def sequential(state: dict[str, Tensor], numbers: Sequence[int]) -> dict[str, Tensor]:
    places = dict(zip(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), map(str, numbers), strict=True))
    return {f"{places[name.split('.')[0]]}.{name.split('.', 1)[1]}": value for name, value in state.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


ONE = torch.zeros(1)
MLP = {"0.weight": torch.zeros(2, 2), "0.bias": ONE, "1.running_mean": ONE, "1.num_batches_tracked": ONE.long()}
OPTIMIZER = {"state": {0: {"momentum_buffer": ONE, "step": torch.zeros(())}}, "param_groups": [{"lr": 0.1}]}


def in_the_wild(state: dict[str, Tensor]) -> dict[str, tuple[str, str, Any]]:
    """File name to (layout, framework, content as the project of that name saves it)."""
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    plain = {**state, "fc.weight": torch.zeros(10, 2), "fc.bias": ONE}
    listed = sequential(state, (0, 1, 4, 5, 6, 7))
    cifar_like = {
        name.replace("downsample", "shortcut"): tensor for name, tensor in sequential(state, (0, 1, 2, 3, 4, 5)).items()
    }
    arrays = {to_detectron2(name): tensor.numpy() for name, tensor in state.items() if not name.endswith(COUNTER)}
    detector = {
        **{
            f"{'roi_heads' if name.startswith('res5') else 'backbone'}.{name}": torch.from_numpy(array)
            for name, array in arrays.items()
        },
        **under("proposal_generator.rpn_head.conv.", {"weight": ONE}),
        **under("roi_heads.", {"res5.norm.weight": ONE, "box_predictor.cls_score.weight": ONE}),
    }
    moco1 = {
        **under("module.encoder_q.", {**state, "fc.weight": ONE, "fc.bias": ONE}),
        **under("module.encoder_k.", {**other, "fc.weight": ONE, "fc.bias": ONE}),
        "module.queue": ONE,
        "module.queue_ptr": ONE,
    }
    trunk = {"trunk": {"_feature_blocks": state}, "heads": under("0.clf.", MLP)}
    return {
        "moco_v1.pth.tar": ("moco", "moco", {"epoch": 200, "arch": "x", "state_dict": moco1, "optimizer": OPTIMIZER}),
        "moco_v3.pth.tar": (
            "mocov3",
            "mocov3",
            {
                "state_dict": {
                    **under("module.base_encoder.", {**state, **under("fc.", MLP)}),
                    **under("module.momentum_encoder.", other),
                    **under("module.predictor.", MLP),
                }
            },
        ),
        "simsiam.pth.tar": (
            "simsiam",
            "simsiam",
            {
                "state_dict": {
                    **under("module.encoder.", {**state, **under("fc.", MLP)}),
                    **under("module.predictor.", MLP),
                },
                "optimizer": OPTIMIZER,
            },
        ),
        "barlow_full.pth": (
            "barlowtwins",
            "barlowtwins",
            {
                "epoch": 1,
                "model": {
                    **under("module.backbone.", state),
                    **under("module.projector.", MLP),
                    "module.bn.running_mean": ONE,
                    "module.bn.running_var": ONE,
                },
                "optimizer": OPTIMIZER,
            },
        ),
        "barlow_resnet50.pth": ("plain", "unknown", state),
        "swav.pth.tar": (
            "swav",
            "swav",
            {**under("module.", state), **under("module.projection_head.", MLP), "module.prototypes.weight": ONE},
        ),
        "swav_ckp.pth": (
            "swav",
            "swav",
            {
                "state_dict": {
                    **under("module.", state),
                    **under("module.projection_head.", MLP),
                    "module.prototypes.weight": ONE,
                },
                "optimizer": OPTIMIZER,
                "amp": {"loss_scaler0": {"loss_scale": 1.0}},
            },
        ),
        "byol_a.pth": (
            "byol",
            "byol",
            {**under("online_network.", state), **under("target_network.", other), **under("predictor.", MLP)},
        ),
        "byol_b.pth": (
            "byol",
            "byol",
            {
                "model": {
                    **under("module.online_encoder.", {**state, **under("projector.", MLP)}),
                    **under("module.target_encoder.", other),
                    **under("module.online_predictor.", MLP),
                }
            },
        ),
        "byol_c.pth": (
            "byol",
            "byol",
            {
                "online_network_state_dict": {**under("encoder.", listed), **under("projetion.", MLP)},
                "target_network_state_dict": other,
                "optimizer_state_dict": OPTIMIZER,
            },
        ),
        "vicreg.pth": (
            "vicreg",
            "vicreg",
            {
                "epoch": 1,
                "model": {**under("module.backbone.", state), **under("module.projector.", MLP)},
                "optimizer": OPTIMIZER,
            },
        ),
        "dino.pth": (
            "dino",
            "dino",
            {
                "student": {**under("module.backbone.", other), **under("module.head.", MLP)},
                "teacher": {**under("module.backbone.", state), **under("module.head.", MLP)},
                "optimizer": OPTIMIZER,
                "args": Namespace(arch="x"),
                "dino_loss": {"center": ONE},
            },
        ),
        "dino_one_gpu.pth": (
            "dino",
            "dino",
            {
                "student": under("module.backbone.", other),
                "teacher": {**under("backbone.", state), **under("head.", MLP)},
            },
        ),
        "vissl.torch": (
            "vissl",
            "unknown",
            {
                "phase_idx": 3,
                "classy_state_dict": {
                    "base_model": {"model": trunk, "meta": {}},
                    "optimizer": OPTIMIZER,
                    "losses": ONE,
                },
            },
        ),
        "solo.ckpt": (
            "solo-learn",
            "unknown",
            {
                "epoch": 1,
                "pytorch-lightning_version": "1",
                "state_dict": {
                    **under("backbone.", state),
                    **under("momentum_backbone.", other),
                    **under("projector.", MLP),
                    **under("momentum_projector.", MLP),
                    **under("classifier.", {"weight": ONE}),
                    "queue": ONE,
                },
                "optimizer_states": [OPTIMIZER],
                "lr_schedulers": [],
                "callbacks": {},
            },
        ),
        "lightly.ckpt": (
            "lightly",
            "unknown",
            {
                "state_dict": {
                    **under("backbone.", listed),
                    **under("backbone_momentum.", listed),
                    **under("projection_head.layers.", MLP),
                    **under("projection_head_momentum.layers.", MLP),
                    "criterion.memory_bank.bank": ONE,
                },
                "optimizer_states": [OPTIMIZER],
            },
        ),
        "lightly_small.ckpt": (
            "lightly",
            "unknown",
            {"state_dict": {**under("backbone.", cifar_like), **under("prediction_head.layers.", MLP)}},
        ),
        "timm.pth.tar": (
            "plain",
            "unknown",
            {"arch": "x", "state_dict": plain, "state_dict_ema": plain, "optimizer": OPTIMIZER},
        ),
        "torchvision.pth": ("plain", "unknown", plain),
        "compiled.pth": ("plain", "unknown", under("module._orig_mod.", plain)),
        "detectron2.pkl": (
            "detectron2",
            "unknown",
            {"model": {**arrays, "stem.fc.0.weight": np.zeros(2)}, "__author__": "x"},
        ),
        "detector.pth": ("detectron2", "unknown", {"model": detector, "optimizer": OPTIMIZER, "iteration": 7}),
        "ours.pt": (
            "mixmask-checkpoint",
            "unknown",
            {
                "fingerprint": "x",
                "step": 3,
                "model": {
                    **under("query_encoder.trunk.", state),
                    **under("query_encoder.projector.", MLP),
                    **under("key_encoder.trunk.", other),
                    **under("key_encoder.projector.", MLP),
                    "queue": ONE,
                    "queue_position": ONE,
                },
                "optimizer": OPTIMIZER,
            },
        ),
    }


def test_every_layout_is_recognised_and_accounted_for(resnet50: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet50)
    for name, (layout, framework, content) in in_the_wild(state).items():
        path = tmp_path / name
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
        source = read_source(path)
        account = source.account
        assert account.layout.startswith(f"{layout}: "), (name, account.layout)
        assert source.info.framework == framework, name
        assert source.info.arch == "resnet50"
        assert bool(account.warnings) == (layout == "detectron2")
        for key in state:
            if not key.endswith(COUNTER):
                assert torch.equal(source.state[key], state[key]), (name, key)
        assert len(account.used) + len(account.left_out) == len(dict(_tensors(read_tensors(path)))), name
        assert not account.used.keys() & account.left_out.keys()
        text, problem = inspect(path, every=True)
        assert problem is None
        assert all(f"  {whole}  " in text for whole in account.used)
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
    assert set(source.account.left_out.values()) == {"outside the given prefix"}
    assert len(source.account.left_out) == len(state) + 1
    with pytest.raises(CheckpointError, match=r"no first convolution .* behind the prefix 'a\.': there stand net\.bn1"):
        read_source(path, Reading(prefix="a."))
    with pytest.raises(CheckpointError, match=r"--as moko: valid: .*did you mean 'moco'"):
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
    with pytest.raises(CheckpointError, match="unknown layout"):
        read_source(save(tmp_path, content))
    source = read_source(save(tmp_path, content), Reading(arch="timm/convnext_atto"))
    assert set(source.account.left_out.values()) == {"head"}
    said = export(source, tmp_path / "own.safetensors", "mixmask")
    assert "same features" in said
    back = read_source(tmp_path / "own.safetensors")
    assert back.info == source.info
    assert all(torch.equal(back.state[name], state[name]) for name in state)
    assert "timm's convnext_atto loads them" in export(source, tmp_path / "timm.safetensors", "timm")
    with pytest.raises(CheckpointError, match=r"--arch timm/convnext_ato: .*did you mean timm/convnext_atto"):
        read_source(save(tmp_path, content), Reading(arch="timm/convnext_ato"))


def test_statistics_of_a_network_that_never_trained_are_warned_of(tmp_path: Path) -> None:
    fresh = build_trunk(BackboneRecipe(arch="resnet18")).state_dict()
    (warning,) = read_source(save(tmp_path, fresh)).account.warnings
    assert "20 of 20 batch normalisations have the statistics of initialisation (bn1, layer1.0.bn1 …" in warning


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
    with pytest.raises(CheckpointError, match="the same way through its containers"):
        read_source(save(tmp_path, {"a": {"b": ONE}, "a.b": ONE}))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_every_plain_kind_are_restored(protocol: int, tmp_path: Path) -> None:
    arrays = {
        f"{kind}{order}": np.asfortranarray(np.arange(6).reshape(2, 3).astype(f"{order}{kind}"))
        for kind in ("f4", "f8", "f2", "i8", "u1")
        for order in "<>"
    }
    arrays |= {"empty": np.zeros((0, 3), dtype=np.float32), "none": np.array(7), "sure": np.array([True, False])}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "score": np.float64(2.5)}, protocol=protocol))
    back = read_tensors(path)
    assert back["score"] == 2.5
    for name, array in arrays.items():
        assert back["model"][name].shape == array.shape
        assert np.array_equal(back["model"][name], array), name


def test_arrays_that_hold_objects_are_refused(tmp_path: Path) -> None:
    """numpy's own restoring takes a pointer out of such a file."""
    for value in (np.array([{}], dtype=object), np.zeros(1, dtype=[("a", "O")]), np.zeros(2, dtype="V8")):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": value}))
        with pytest.raises(CheckpointError, match=r"refused.*: numpy\.dtype"):
            read_tensors(tmp_path / "x.pkl")


def test_detectron2_files_with_batch_counters_are_read(resnet18: Path, tmp_path: Path) -> None:
    """MoCo's converter keeps them, as arrays without dimensions."""
    state, _ = load_backbone(resnet18)
    model = {to_detectron2(name): tensor.numpy() for name, tensor in state.items()}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "MOCO"}))
    source = read_source(tmp_path / "x.pkl")
    assert all(torch.equal(source.state[name], state[name]) for name in state)
    assert not source.account.filled
