"""Pretraining on other data than folders of RGB images with classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mixmask
from mixmask.engine.backbones import load_backbone
from mixmask.engine.data import open_split
from mixmask.engine.errors import CheckpointError, ConfigError, DataError, UserError
from mixmask.engine.normalization import Statistics
from mixmask.launch.commands.app import app
from mixmask.pretrain import stage
from mixmask.transfer import stage as transfer
from mixmask.transfer.checkpoints.export import check_export
from mixmask.transfer.checkpoints.source import read_source
from mixmask.transfer.recipe import load_transfer_recipe
from tests.engine.containers import CONTAINERS, packed, recipe
from tests.pretrain.small_runs import interrupt_at, plan

SMALL = "backbone.arch=timm/test_resnet"
COLOURLESS = ["augment.hue=0", "augment.saturation=0", "augment.grayscale_probability=0"]


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["stream", "resident"])
def test_a_run_on_packed_images_is_the_run_on_folders_bit_for_bit(
    storage: str, config: Path, shapes: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    common = [SMALL, f"data.storage={storage}", "max_steps=4", "monitor={every_epochs: 1, k: 5}", "checkpoint_every=2"]
    whole = plan(config, tmp_path / "folder", *common)
    stage.run(whole)
    shards, table = (CONTAINERS[name](shapes, tmp_path / name) for name in ("shards", "parquet"))
    # Begun on shards, broken off, and resumed on a table: where images lie is not part of a run's identity.
    begun = plan(config, tmp_path / "runs", *common, f"data.root={shards}")
    assert begun.fingerprint == whole.fingerprint
    interrupt_at(3, begun)
    resumed = plan(config, tmp_path / "runs", *common, f"data.root={table}")
    assert resumed.run.path == begun.run.path
    stage.run(resumed)
    ours, theirs = (load_backbone(one.backbone_file)[0] for one in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [
        [
            (line.get("loss"), line.get("knn/top1"))
            for line in map(json.loads, one.run.log_file.read_text().splitlines())
        ]
        for one in (whole, resumed)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_images_without_classes_are_pretrained_on_and_watched_with_others(
    config: Path, shapes: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    for number, path in enumerate(open_split(recipe(shapes), "train").paths):
        folder = photos / f"{number % 4}" / ("deep" if number % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{number}{path.suffix}")
    base = [SMALL, f"data.root={photos}", "data.name=photos", "data.labels=false", "max_steps=2"]
    with pytest.raises(ConfigError, match=r"monitor needs labels; set monitor: null, or monitor\.data"):
        plan(config, tmp_path, *base, "monitor={every_epochs: 1}")
    labelled = f"monitor={{every_epochs: 1, k: 5, data: {{name: shapes, root: {shapes}, train: train, test: val}}}}"
    one = plan(config, tmp_path, *base, labelled)
    assert "kNN of 40 test against 120 training images of shapes" in one.describe()
    stage.run(one)
    lines = [json.loads(line) for line in one.run.log_file.read_text().splitlines()]
    assert 0 <= lines[-1]["knn/top1"] <= 100
    assert one.fingerprint != plan(config, tmp_path, *base).fingerprint
    # A list has labels or not: only reading it shows.
    (tmp_path / "list.txt").write_text("\n".join(map(str, open_split(recipe(shapes), "train").paths)))
    with pytest.raises(ConfigError, match=r"have no labels, which kNN needs; set monitor=null, or monitor\.data"):
        plan(config, tmp_path, f"data.root={tmp_path / 'list.txt'}", "monitor={every_epochs: 1}")
    (tmp_path / "other.txt").write_text("\n".join(map(str, open_split(recipe(shapes), "test").paths)))
    with pytest.raises(DataError, match="its images have no labels, and a score needs them"):
        _transfer(tmp_path, "knn", tmp_path, one.backbone_file, "data.train=list.txt", "data.test=other.txt")


def _transfer(out: Path, protocol: str, root: Path, backbone: Path, *overrides: str) -> transfer.TransferPlan:
    file = out / f"{protocol}.yaml"
    file.write_text(
        f"protocol: {protocol}\nname: x\ndata: {{name: shapes, root: {root}, train: train, test: val}}\n"
        "evaluation: {resize: null, crop: 32}\n"
    )
    return transfer.plan(load_transfer_recipe(file, [f"backbone={backbone}", *overrides]), out / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "timm/test_convnext"])
def test_grey_networks_pretrain_and_transfer(arch: str, config: Path, shapes: Path, tmp_path: Path) -> None:
    grey = ["backbone.in_channels=1", f"backbone.arch={arch}", *COLOURLESS, "max_steps=2", "framework.bn_splits=1"]
    one = plan(config, tmp_path, *grey, "monitor={every_epochs: 1, k: 5}", "data.storage=resident")
    stage.run(one)
    _, info = load_backbone(one.backbone_file)
    assert info.in_channels == 1
    record = transfer.run(_transfer(tmp_path, "knn", shapes, one.backbone_file, "k=5"))
    # The monitor took the same images with the same features.
    own = json.loads(one.run.record_file.read_text())["metrics"]["knn/top1"]
    assert record.metrics["knn/top1"] == pytest.approx(own, abs=5)
    model = mixmask.load_backbone(one.backbone_file)
    assert 0 <= mixmask.knn(model, shapes, resize=None, crop=32, k=5) <= 100
    assert 0 <= mixmask.linear_probe(model, shapes, epochs=1, resize=None, crop=32, lr=0.1, batch_norm=False) <= 100
    source = read_source(one.backbone_file)
    for target, name in (("torchvision", "b.pth"), ("detectron2", "b.pkl"), ("timm", "b.safetensors")):
        with pytest.raises(
            CheckpointError, match=r"takes images of 1 channels, and .* take RGB; mixmask.s own file is the only form"
        ):
            check_export(source, tmp_path / name, target)
    if arch == "resnet18":  # as a foreign checkpoint: the first convolution tells
        torch.save(load_backbone(one.backbone_file)[0], tmp_path / "foreign.pth")
        assert read_source(tmp_path / "foreign.pth").info.in_channels == 1


def test_detection_of_networks_for_other_images_is_refused(voc: Path, config: Path, tmp_path: Path) -> None:
    grey = ["backbone.in_channels=1", "epochs=0", *COLOURLESS, "framework.bn_splits=1"]
    one = plan(config, tmp_path, *grey)
    stage.run(one)
    file = tmp_path / "voc.yaml"
    file.write_text(f"base: detect_voc_smoke\ndata: {{root: {voc}}}\n")
    with pytest.raises(UserError, match="takes images of 1 channels, and the protocol reads RGB images only"):
        transfer.plan(load_transfer_recipe(file, [f"backbone={one.backbone_file}", "device=cpu"]), tmp_path / "runs")


@pytest.mark.slow
def test_images_of_many_channels(config: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(32):
        folder = tmp_path / "bands" / "train" / f"{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number}.npy", rng.integers(0, 4096, (40, 36, 6), dtype=np.uint16))
    bands = [
        SMALL,
        f"data.root={tmp_path / 'bands'}",
        "data.name=bands",
        "data.levels=[0, 4095]",
        "backbone.in_channels=6",
        "max_steps=2",
    ]
    with pytest.raises(ConfigError, match="for 6 channels give your own"):
        plan(config, tmp_path, *bands)
    own = "augment.normalization={mean: [0.5, 0.5, 0.5, 0.5, 0.5, 0.5], std: [0.3, 0.3, 0.3, 0.3, 0.3, 0.3]}"
    with pytest.raises(
        ConfigError, match=r"augment\.hue, augment\.saturation, augment\.grayscale_probability need RGB"
    ):
        plan(config, tmp_path, *bands, own)
    one = plan(config, tmp_path, *bands, own, *COLOURLESS)
    stage.run(one)
    _, info = load_backbone(one.backbone_file)
    assert info.in_channels == 6
    assert isinstance(info.normalization, Statistics)
    # Features of other levels are other features.
    knn = ["k=2", f"feature_cache={tmp_path / 'cache'}", "data.allow_overlap=true", "data.test=train"]
    for levels in ("[0, 4095]", "[0, 65535]", "[0, 4095]"):
        transfer.run(
            _transfer(
                tmp_path,
                "knn",
                tmp_path / "bands",
                one.backbone_file,
                *knn,
                f"data.levels={levels}",
                f"name=l{levels[4:8]}",
            )
        )
    assert len([*(tmp_path / "cache").iterdir()]) == 2
    shards = packed(tmp_path / "bands", tmp_path / "shards", test="train", allow_overlap=True)
    assert open_split(recipe(shards), "train").with_decoding(6, (0, 4095)).read(0).shape == (6, 40, 36)
    Image.new("RGB", (40, 40)).save(tmp_path / "bands" / "train" / "0" / "rgb.png")
    images = open_split(recipe(tmp_path / "bands"), "train").with_decoding(6)
    with pytest.raises(DataError, match=r"has 3 channels, and the network takes 6 \(backbone\.in_channels\)"):
        images.check()
    views = tmp_path / "views.png"
    (tmp_path / "bands" / "train" / "0" / "rgb.png").unlink()
    assert command("show-views", config, *bands, own, *COLOURLESS, "--out", views, "--num", 4)[0] == 0
    assert views.stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_leaves_unreadable_images_out(
    config: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(shapes, tmp_path / "data")
    broken = open_split(recipe(tmp_path / "data"), "train").paths[11]
    content = broken.read_bytes()
    broken.write_bytes(content[:60] + bytes(len(content) - 120) + content[-60:])
    base = [SMALL, f"data.root={tmp_path / 'data'}", "max_steps=8", "epochs=3", "monitor=null", "log_every=4"]
    skipping = plan(config, tmp_path, *base, "data.skip_unreadable=true")
    assert skipping.batches.steps_per_epoch == 7
    stage.run(skipping)
    record = json.loads(skipping.run.record_file.read_text())
    left = open_split(recipe(tmp_path / "data"), "train").subset([i for i in range(120) if i != 11])
    assert record["data"]["train"] == left.summary()["listing"]
    assert stage.run(skipping) == skipping.backbone_file  # finished: it knows the images that it has left out
    assert skipping.fingerprint != plan(config, tmp_path, *base).fingerprint


# --- the commands ----------------------------------------------------------------------------------------------------


def test_pack_and_check_data(shapes: Path, tmp_path: Path) -> None:
    code, out = command("pack", shapes, tmp_path / "out", "--shard-size", "40KB")
    assert code == 0
    assert f"{tmp_path / 'out' / 'train'}: 120 images in 6 shards" in out
    code, out = command("check-data", tmp_path / "out")
    assert code == 0
    assert out.count("kind      shards") == 2
    assert "120 in 10 classes, 12 per class" in out
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(open_split(recipe(shapes), "test").paths):
        shutil.copy(path, flat / f"{number}{path.suffix}")
    code, out = command("check-data", flat, "--no-labels")
    assert code == 0
    assert "images    40, without labels" in out
    code, out = command("pack", flat, tmp_path / "flat-out", "--no-labels")
    assert code == 0
    assert len(open_split(recipe(tmp_path / "flat-out"), "train")) == 40
    with pytest.raises(DataError, match=r"data\.labels=false"):
        command("check-data", flat)
    for index in (tmp_path / "out").rglob("index.safetensors"):
        index.unlink()
    code, out = command("pack", tmp_path / "out")  # of shards that are there, the index only
    assert (code, out.count("images in")) == (0, 2)
    assert open_split(recipe(tmp_path / "out"), "train").summary() == open_split(recipe(shapes), "train").summary()
    with pytest.raises(UserError, match=r"--shard-size 3 apples: a number and KB, MB or GB"):
        command("pack", flat, tmp_path / "x", "--shard-size", "3 apples")
    with pytest.raises(UserError, match=r"lies in .*; name a folder outside"):
        command("pack", shapes, shapes / "packed")
    with pytest.raises(UserError, match=r"no \.tar files to index"):
        command("pack", shapes)
