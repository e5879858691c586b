"""Choosing an engine, what a run keeps, and both engines end to end, also in several processes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask.engine.backbones import BackboneInfo, BackboneRecipe, build_trunk, load_backbone, save_backbone
from mixmask.engine.errors import ConfigError, DataError, RunDirectoryError, UserError
from mixmask.transfer import stage
from mixmask.transfer.checkpoints.names import COUNTER, to_detectron2
from mixmask.transfer.detection.commands import dump_detectron2_config, show_detections
from mixmask.transfer.detection.data.annotations import open_detection, open_test
from mixmask.transfer.detection.results.metrics import FoundObject
from mixmask.transfer.detection.results.predictions import load_detections, save_detections
from mixmask.transfer.detection.run import describe_schedule
from tests.processes import ROOT, finish, processes
from tests.transfer.detection.small_recipes import COCO, VOC, plan, recipe_of

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
needs_detectron2 = pytest.mark.skipif(not HAS_DETECTRON2, reason="Detectron2 cannot be imported")
ENGINES = ["torchvision", pytest.param("detectron2", marks=needs_detectron2)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_a_run_keeps_what_it_found_and_learnt(
    engine: str, kind: str, voc: Path, coco: Path, tmp_path: Path, resnet18: Path
) -> None:
    text, root = (VOC, voc) if kind == "voc" else (COCO, coco)
    ready = plan(text, root, tmp_path, resnet18, f"engine={engine}", "save_detector=true", "iterations=3")
    record = stage.run(ready)
    assert record.settings["engine"] == engine
    assert 0 <= record.metrics["bbox/AP"] <= record.metrics["bbox/AP50"] <= 100
    assert any(name.startswith("bbox/AP/") for name in record.metrics)
    assert {path.name for path in ready.run.path.iterdir()} == {
        "recipe.yaml", "log.jsonl", "record.json", "detections.json.gz", "detector.pth", "detections.jpg",
        "matches_bbox.npz", *(["matches_segm.npz"] if kind == "coco" else []),
    }  # fmt: skip
    lines = [json.loads(line) for line in ready.run.log_file.read_text().splitlines()]
    names = {"step", "loss", "rpn_objectness", "rpn_box", "roi_class", "roi_box", "lr", "images_per_second"}
    assert names | ({"roi_mask"} if kind == "coco" else set()) <= lines[-1].keys()
    assert lines[-1]["step"] == 3
    found = load_detections(ready.run.path / "detections.json.gz", ready.test)
    assert all((d.mask is not None) == (kind == "coco") for d in found)
    detector = torch.load(ready.run.path / "detector.pth", weights_only=True)["model"]
    state, _ = load_backbone(resnet18)
    for name in state:
        if not name.endswith(COUNTER):
            place = to_detectron2(name)
            assert f"{'roi_heads' if place.startswith('res5') else 'backbone'}.{place}" in detector
    assert "roi_heads.res5.norm.weight" in detector
    said = show_detections(ready.run.path, tmp_path / "found.html", 3, 0.0)
    assert "3 pictures" in said
    page = (tmp_path / "found.html").read_text()
    assert page.count("<figure>") == 3
    assert "http" not in page


@pytest.mark.slow
def test_detections_are_drawn(coco: Path, tmp_path: Path, resnet18: Path) -> None:
    ready = plan(COCO, coco, tmp_path, resnet18)
    with pytest.raises(RunDirectoryError, match="no run directory"):
        show_detections(ready.run.path, tmp_path / "x.png", 4, 0.3)
    stage.run(ready)
    save_detections(
        ready.run.path / "detections.json.gz",
        [FoundObject(n, i.label, 0.9, i.box) for n, p in enumerate(ready.test.pictures) for i in p.instances],
        ready.test,
    )
    assert "2 pictures" in show_detections(ready.run.path, tmp_path / "x.png", 2, 0.3)
    drawn = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
    assert "the best of all pictures has 0.90: --score 0.45" in show_detections(
        ready.run.path, tmp_path / "x.png", 2, 0.95
    )
    with pytest.raises(DataError, match=r"name a \.png or \.html file"):
        show_detections(ready.run.path, tmp_path / "x.gif", 2, 0.3)


def test_detections_round_trip_and_are_checked(coco: Path, voc: Path, tmp_path: Path) -> None:
    pictures = open_test(recipe_of(COCO, coco, tmp_path))
    mask = {"size": [4, 4], "counts": b"04O1"}
    found = [FoundObject(0, 1, 0.25, (1.0, 2.5, 3.0, 4.0), mask), FoundObject(2, 0, 1.0, (0.0, 0.0, 5.0, 5.0))]
    path = tmp_path / "d.json.gz"
    save_detections(path, found, pictures)
    back = load_detections(path, pictures)
    assert [(d.picture, d.label, d.score, d.box) for d in back] == [(d.picture, d.label, d.score, d.box) for d in found]
    assert back[0].mask == {"size": [4, 4], "counts": "04O1"}
    with pytest.raises(DataError, match=r"are not those that data\.root holds now"):
        load_detections(path, open_test(recipe_of(VOC, voc, tmp_path)))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"damaged|truncated"):
        load_detections(path, pictures)
    with pytest.raises(DataError, match="save_predictions: true"):
        load_detections(tmp_path / "none", pictures)


def test_without_detectron2_its_engine_says_how_to_get_it(
    voc: Path, tmp_path: Path, resnet18: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.setitem(sys.modules, "detectron2.engine", None)
    with pytest.raises(ConfigError, match=r"does not import here(.|\n)*pip install(.|\n)*engine=torchvision"):
        plan(VOC, voc, tmp_path, resnet18, "engine=detectron2")
    assert not (tmp_path / "runs").exists()


def timm_backbone(path: Path, name: str) -> Path:
    torch.manual_seed(0)
    trunk = build_trunk(BackboneRecipe(arch=name))
    info = BackboneInfo(
        arch=name, stem="standard", framework="mocov2", method="vanilla", fingerprint=name[-5:], lineage="x"
    )
    save_backbone(path, trunk.state_dict(), info)
    return path


@pytest.mark.slow
def test_networks_of_timm_where_c4_makes_sense(voc: Path, tmp_path: Path) -> None:
    record = stage.run(plan(VOC, voc, tmp_path, timm_backbone(tmp_path / "b.safetensors", "timm/resnet18d")))
    assert record.arch == "timm/resnet18d"
    with pytest.raises(ConfigError, match="save_detector"):
        plan(VOC, voc, tmp_path, tmp_path / "b.safetensors", "save_detector=true")
    for name in ("timm/convnext_atto", "timm/regnetx_002", "timm/resnet18.fb_ssl_yfcc100m_ft_in1k"):
        backbone = timm_backbone(tmp_path / "other.safetensors", name)
        if "resnet18" in name:
            plan(VOC, voc, tmp_path, backbone)
        else:
            with pytest.raises(ConfigError, match="is no ResNet with batch normalisation and strides 4, 8, 16, 32"):
                plan(VOC, voc, tmp_path, backbone)


def test_images_of_another_size_than_annotated_are_found(voc: Path, tmp_path: Path) -> None:
    shutil.copytree(voc, tmp_path / "devkit")
    picture = tmp_path / "devkit" / "VOC2007" / "JPEGImages" / "000002.jpg"
    image = Image.open(picture).convert("RGB")
    image.resize((image.width + 7, image.height)).save(picture)
    with pytest.raises(DataError, match=r"000002\.jpg: is \d+×\d+ pixels, its annotation says"):
        open_detection(recipe_of(VOC, tmp_path / "devkit", tmp_path))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(picture, exif=exif)  # turned back when it is read
    open_detection(recipe_of(VOC, tmp_path / "devkit", tmp_path))


def test_the_schedule_in_force_is_told(voc: Path, tmp_path: Path) -> None:
    keys = ["reference_batch_size=16", "batch_size=8", "lr=0.02", "iterations=24000", "milestones=[18000,22000]"]
    text = describe_schedule(recipe_of(VOC, voc, tmp_path, *keys))
    assert text.startswith("48,000 iterations of 8 images, lr 0.01, steps 36000, 44000, warm-up 2")
    assert "scaled linearly from 24,000 of 16, lr 0.02, steps 18000, 22000, warm-up 1" in text


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_make_one_run(engine: str, coco: Path, tmp_path: Path, resnet18: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(COCO.replace("ROOT", str(coco)))
    ended = finish(
        processes(
            2, "transfer", str(config), f"backbone={resnet18}", f"engine={engine}", "--runs", str(tmp_path / "runs")
        )
    )
    assert [code for code, *_ in ended] == [0, 0], ended
    assert ended[1][1].strip() == ""
    (record,) = (tmp_path / "runs").rglob("record.json")
    content = json.loads(record.read_text())
    assert content["environment"]["world_size"] == 2
    found = load_detections(record.parent / "detections.json.gz", open_test(recipe_of(COCO, coco, tmp_path)))
    assert [d.picture for d in found] == sorted(d.picture for d in found)
    odd = finish(
        processes(
            2,
            "transfer",
            str(config),
            f"backbone={resnet18}",
            f"engine={engine}",
            "batch_size=3",
            "--runs",
            str(tmp_path),
        )
    )
    assert [code for code, *_ in odd] == [2, 2]
    assert "batch_size 3 cannot be shared by 2 processes: choose a multiple of 2" in odd[0][2]


def test_ours_samples_the_same_in_any_number_of_processes(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixmask.engine import distributed
    from mixmask.transfer.detection.data.batches import training_batches
    from mixmask.transfer.detection.engines.torchvision import draws_of

    recipe = recipe_of(COCO, coco, tmp_path, "batch_size=4")
    train, _ = open_detection(recipe)
    whole = list(training_batches(train, recipe, 0, 0, 3))
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "_world", distributed.World(rank, 2, rank))
        share = list(training_batches(train, recipe, 0, 0, 3))
        for step, (part, batch) in enumerate(zip(share, whole, strict=True)):
            mine = batch.images[2 * rank : 2 * rank + 2]
            assert all(torch.equal(a, b) for a, b in zip(part.images, mine, strict=True))
            drawn = [int(torch.randint(10**6, (), generator=g)) for g in draws_of(recipe, 0, step)]
            monkeypatch.setattr(distributed, "_world", distributed.World())
            alone = [int(torch.randint(10**6, (), generator=g)) for g in draws_of(recipe, 0, step)]
            monkeypatch.setattr(distributed, "_world", distributed.World(rank, 2, rank))
            assert drawn == alone[2 * rank : 2 * rank + 2]


# --- Detectron2's engine ---------------------------------------------------------------------------------------------


@needs_detectron2
@pytest.mark.slow
def test_detectron2_goes_on_after_a_stop_signal(voc: Path, tmp_path: Path, resnet18: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(VOC.replace("ROOT", str(voc)))
    command = [
        sys.executable, "-m", "mixmask", "transfer", str(config), f"backbone={resnet18}", "engine=detectron2",
        "iterations=30", "checkpoint_every=4", "log_every=1", "data.num_workers=1", "--runs", str(tmp_path / "runs"),
    ]  # fmt: skip
    started = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in (tmp_path / "runs").rglob("log.jsonl")):
        assert started.poll() is None, started.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGTERM)  # its loader's worker, too, as a cluster does
    _, said = started.communicate(timeout=60)
    assert started.returncode == 143, said
    assert "stopped at step" in said
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stderr
    (log,) = (tmp_path / "runs").rglob("log.jsonl")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 31))
    assert not (log.parent / "scratch").exists()


@needs_detectron2
def test_what_detectron2_cannot_do_is_refused(voc: Path, coco: Path, tmp_path: Path, resnet18: Path) -> None:
    for keys, message in (
        (["precision=bf16"], "precision: Detectron2 has fp32"),
        (["clip_norm=5"], "clip_norm: Detectron2 clips each parameter"),
        (
            ["data.test=[2007/test,2007/trainval]", "data.train=[2007/test]", "data.allow_overlap=true"],
            "Detectron2 evaluates each of",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(VOC, voc, tmp_path, resnet18, "engine=detectron2", *keys)
    with pytest.raises(ConfigError, match="detectron2 has ResNets only"):
        plan(VOC, voc, tmp_path, timm_backbone(tmp_path / "t.safetensors", "timm/resnet18d"), "engine=detectron2")
    shutil.copytree(voc, tmp_path / "devkit")
    name = (tmp_path / "devkit/VOC2007/ImageSets/Main/test.txt").read_text().split()[0]
    annotation = tmp_path / "devkit/VOC2007/Annotations" / f"{name}.xml"
    annotation.write_text(annotation.read_text().replace("</xmin>", ".5</xmin>"))
    with pytest.raises(ConfigError, match=r"Detectron2 cannot read it .*wants whole numbers.*engine=torchvision can"):
        plan(VOC, tmp_path / "devkit", tmp_path, resnet18, "engine=detectron2")
    plan(VOC, tmp_path / "devkit", tmp_path, resnet18)


@needs_detectron2
def test_the_dumped_config_is_detectron2s_own(coco: Path, tmp_path: Path, resnet50: Path) -> None:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    import mixmask.transfer.detection.detectors.c4.heads  # noqa: F401
    from mixmask.transfer.detection.engines.detectron2 import require_landed

    with pytest.raises(ConfigError, match="holds 10 classes, the sets that Detectron2 knows under these names have 80"):
        dump_detectron2_config(plan(COCO, coco, tmp_path, resnet50), tmp_path / "coco.yaml")
    shutil.copytree(coco, tmp_path / "full")
    for file in (tmp_path / "full" / "annotations").iterdir():
        document = json.loads(file.read_text())
        known = {c["id"] for c in document["categories"]}
        document["categories"] += [{"id": 1000 + n, "name": f"c{n}"} for n in range(80 - len(known))]
        file.write_text(json.dumps(document))
    keys = ["reference_batch_size=16", "lr=0.02", "iterations=90000"]
    ready = plan(COCO, tmp_path / "full", tmp_path, resnet50, *keys)
    with pytest.raises(ConfigError, match=r"configs end in \.yaml"):
        dump_detectron2_config(ready, tmp_path / "coco.pkl")
    said = dump_detectron2_config(ready, tmp_path / "out" / "coco.yaml")
    assert "265 tensors" in said
    with pytest.raises(UserError, match=r"coco\.yaml: exists already.*--force"):
        dump_detectron2_config(ready, tmp_path / "out" / "coco.yaml")
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "out" / "coco.yaml"))
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.0025, 720000)
    assert cfg.MODEL.RESNETS.NORM == "SyncBN"
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM = "cpu", "BN"
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    require_landed(model, ready.source.state, ready.recipe.detector)


@needs_detectron2
def test_our_saved_detector_loads_in_detectron2(voc: Path, tmp_path: Path, resnet18: Path) -> None:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    from mixmask.transfer.detection.engines.detectron2_config import make_config

    ready = plan(VOC, voc, tmp_path, resnet18, "save_detector=true")
    stage.run(ready)
    path = ready.run.path / "detector.pth"
    cfg = make_config(
        ready.recipe, ready.source.info.recipe, len(ready.test.classes), device=torch.device("cpu"), precision="fp32",
        seed=0, weights=path, output=tmp_path, train=[], test=[], num_workers=0, checkpoint_every=5,
    )  # fmt: skip
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(path))
    kept = torch.load(path, weights_only=True)["model"]
    state = model.state_dict()
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[name], kept[name]) for name in state)


@needs_detectron2
def test_a_dump_for_2012_says_how_it_is_measured(voc: Path, tmp_path: Path, resnet50: Path) -> None:
    from detectron2.config import get_cfg

    from mixmask.transfer.detection.detectors.c4 import heads  # noqa: F401 (registers them)
    from mixmask.transfer.detection.engines import detectron2_config

    root = tmp_path / "devkit"
    shutil.copytree(voc, root)
    shutil.copytree(root / "VOC2007", root / "VOC2012")
    lists = root / "VOC2012" / "ImageSets" / "Main"
    shutil.copy(lists / "test.txt", lists / "val.txt")
    classes = [*"abcdefghijklmnopqrst"]
    recipe = recipe_of(VOC, root, tmp_path, "data.test=[2012/val]", "data.allow_overlap=true")
    pictures = open_test(recipe)
    usual = replace(pictures, classes=(*pictures.classes, *classes)[:20])
    info = load_backbone(resnet50)[1]
    file = tmp_path / "d2.yaml"
    detectron2_config.dump_config(recipe, info.recipe, usual, "fp32", 0, tmp_path / "w.pkl", file)
    text = file.read_text()
    assert 'register_pascal_voc("voc_2012_val_ap07", "datasets/VOC2012", "val", 2007)' in text
    cfg = get_cfg()
    cfg.merge_from_file(str(file))
    assert cfg.DATASETS.TEST == ("voc_2012_val_ap07",)
    assert cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm"
