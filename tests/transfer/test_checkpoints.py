from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from engine.backbones import BackboneRecipe, build_trunk, load_backbone
from engine.errors import CheckpointError
from tests.conftest import make_backbone
from transfer.checkpoints.export import export, from_detectron2, to_detectron2
from transfer.checkpoints.layouts import COUNTER, read_source


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
    assert "53 ×" in message
    for name, array in written["model"].items():
        assert torch.equal(torch.from_numpy(array), source.state[from_detectron2(name)])


@pytest.mark.parametrize(
    ("target", "suffix"), [("torchvision", "pth"), ("torchvision", "safetensors"), ("timm", "safetensors")]
)
def test_round_trips_are_exact(resnet50: Path, tmp_path: Path, target: str, suffix: str) -> None:
    source = read_source(resnet50)
    out = tmp_path / f"out.{suffix}"
    export(source, out, target)
    back = read_source(out)
    assert back.account.layout.startswith("plain")
    assert back.state.keys() == source.state.keys()
    assert all(torch.equal(back.state[name], source.state[name]) for name in source.state)


def test_a_moco_checkpoint_is_accounted_for_tensor_by_tensor(resnet50: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet50)
    source = read_source(moco_checkpoint(tmp_path / "checkpoint_0199.pth.tar", state))
    assert source.info.framework == "mocov2"
    assert source.info.arch == "resnet50"
    assert all(torch.equal(source.state[name], state[name]) for name in state)
    account = source.account
    assert sum(1 for name in account.used.values() if not name.endswith(COUNTER)) == 265
    assert len(account.used) + len(account.left_out) == 2 * (len(state) + 4) + 2
    assert set(account.left_out.values()) == {"head", "momentum encoder", "queue of negatives"}
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
    with pytest.raises(CheckpointError, match=r"unexpected \['decoder\.weight'\]"):
        read_source(save(tmp_path, {**state, "decoder.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\.weight has shape \(1,\)"):
        read_source(save(tmp_path, {**state, "layer1.0.conv1.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"not finite in bn1\.weight"):
        read_source(save(tmp_path, {**state, "bn1.weight": torch.full((64,), float("nan"))}))
    with pytest.raises(CheckpointError, match="unknown layout"):
        read_source(save(tmp_path, {f"model.{name}": value for name, value in state.items()}))
    with pytest.raises(CheckpointError, match="no dictionary of tensors"):
        read_source(save(tmp_path, {"epoch": 3}))
    vit = torchvision.models.vit_b_32(weights=None, image_size=32).state_dict()
    with pytest.raises(CheckpointError, match="unknown layout"):
        read_source(save(tmp_path, vit))
    other = moco_checkpoint(tmp_path / "m.pth", state, **{"module.decoder": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"does not explain: module\.decoder"):
        read_source(other)


def test_other_number_formats_and_memory_layouts_are_read(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    odd = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in state.items()}
    odd = {n: t.bfloat16() if t.is_floating_point() else t for n, t in odd.items()}
    source = read_source(save(tmp_path, odd))
    export(source, tmp_path / "out.pkl", "detectron2")
    export(source, tmp_path / "out.safetensors", "timm")
    for keys in ({1: torch.zeros(1)}, {"state_dict": {**state, 3: torch.zeros(1)}}):
        with pytest.raises(CheckpointError, match="no dictionary of tensors"):
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
        return (Path.touch, (Path("/tmp/mixmask-was-here"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="refused, it holds more than tensors"):
        read_source(save(tmp_path, {"state_dict": Hostile()}))
    assert not Path("/tmp/mixmask-was-here").exists()


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
