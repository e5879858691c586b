"""Labels of results, warnings about recipes and runs, and expectations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixmask.engine.backbones import FORMAT, load_backbone, save_backbone
from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.errors import CheckpointError, ConfigError, DataError, RunFailure
from mixmask.engine.records import Record
from mixmask.transfer import divergence, stage
from mixmask.transfer.protocols.linear import LinearRecipe
from mixmask.transfer.recipe import load_transfer_recipe
from mixmask.transfer.subsets import listed_subset
from tests.transfer.test_classify import KNN, LINEAR, make_plan


@pytest.mark.slow
def test_anyones_method_is_named_in_free_words(
    shapes: Path, tmp_path: Path, resnet18: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, _ = load_backbone(resnet18)
    foreign = tmp_path / "theirs.pth"
    torch.save(state, foreign)
    said = ["method=ours v2", "framework=SwAV++", "pretrain_epochs=150", "pretrain_data=mine"]
    plan = make_plan(KNN, shapes, tmp_path, foreign, *said)
    record = stage.run(plan)
    assert (record.method, record.framework) == ("ours v2", "SwAV++")
    assert (record.pretrain_epochs, record.pretrain_dataset) == (150, "mine")
    again = make_plan(KNN, shapes, tmp_path, foreign, "method=theirs")
    assert again.run.path == plan.run.path  # labels are no part of the identity
    assert stage.run(again).method == "theirs"
    assert "labels updated" in capsys.readouterr().err
    unlabelled = stage.run(make_plan(KNN, shapes, tmp_path, foreign))  # what is not given stays as it was
    assert (unlabelled.method, unlabelled.framework, unlabelled.pretrain_epochs) == ("theirs", "SwAV++", 150)
    assert "labels updated" not in capsys.readouterr().err
    assert Record.read(plan.run.record_file).method == "theirs"
    for key in said:
        with pytest.raises(ConfigError, match=rf"{key.split('=')[0]}=.*says itself that it is"):
            make_plan(KNN, shapes, tmp_path, _labelled(tmp_path, resnet18), key)


def _labelled(tmp_path: Path, backbone: Path) -> Path:
    state, info = load_backbone(backbone)
    path = tmp_path / "labelled.safetensors"
    save_backbone(path, state, info.model_copy(update={"epochs": 3.0, "dataset": "shapes"}))
    return path


def test_milestones_beyond_the_end_are_warned_of(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    plan = make_plan(LINEAR, shapes, tmp_path, resnet18, "milestones=[1, 2, 5]")
    assert "warning   milestones 2, 5 are not reached in 2 epochs" in plan.describe()
    assert "warning   mile" not in make_plan(LINEAR, shapes, tmp_path, resnet18).describe()


def test_training_and_testing_at_other_sizes_is_warned_of(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    assert (
        "augment.crop is 32 and evaluation.crop 64"
        in make_plan(
            LINEAR, shapes, tmp_path, resnet18, "augment.crop=32", "evaluation.resize=64", "evaluation.crop=64"
        ).describe()
    )


@pytest.mark.slow
def test_a_diverging_probe_is_warned_of(
    shapes: Path, tmp_path: Path, resnet18: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.run(make_plan(LINEAR, shapes, tmp_path, resnet18, "lr=1e6", "log_every=1"))
    said = capsys.readouterr().err
    assert "warning: the loss is" in said
    assert "and chance level is 2.3: the learning rate" in said
    capsys.readouterr()
    stage.run(make_plan(LINEAR, shapes, tmp_path, resnet18, "lr=1e-12", "log_every=1"))
    assert "warning: the loss is" not in capsys.readouterr().err


@pytest.mark.parametrize(("top1", "warned"), [(10.0, True), (12.0, True), (12.1, False), (50.0, False)])
def test_a_probe_at_chance_is_warned_of(
    top1: float, warned: bool, shapes: Path, tmp_path: Path, resnet18: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_plan(LINEAR, shapes, tmp_path, resnet18).recipe
    assert isinstance(recipe, LinearRecipe)
    divergence.say_if_at_chance(recipe.name, top1, 10)
    assert ("guessing gives 10.00 %" in capsys.readouterr().err) == warned


def test_an_expectation_for_other_classes_says_so(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    text = LINEAR + "expected: [{metric: linear/top1, value: 70, tolerance: 1, source: table 5}]\n"
    said = make_plan(text, shapes, tmp_path, resnet18, "data.name=shapes").describe()
    assert "expected  " in said
    assert "holds for" not in said
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("ROOT", str(shapes)).replace("name: shapes", "name: cifar100"))
    plan = stage.plan(load_transfer_recipe(config, [f"backbone={resnet18}"]), tmp_path / "runs")
    assert "holds for the 100 classes of cifar100; these data have 10" in plan.describe()


DAMAGED_METADATA = {
    "epochs": [float("nan"), float("inf"), -1, "x", 1e300],
    "framework": ["", 3, "x" * 500],
    "method": ["", None, ["a"]],
    "fingerprint": ["", "../../x", "a b", "\x1b[31m", 7],
    "lineage": ["/", None],
    "seed": [-1, 1.5, 1 << 70, "zero"],
    "pretraining": [{"lr": float("nan")}, [1], {"mix": 3}],
    "normalization": ["lab"],
}


@pytest.mark.parametrize("key", DAMAGED_METADATA)
def test_metadata_of_our_own_files_is_checked_when_they_are_read(key: str, tmp_path: Path, resnet18: Path) -> None:
    state, info = load_backbone(resnet18)
    for value in DAMAGED_METADATA[key]:
        document = {**json.loads(info.model_dump_json()), key: value}
        path = tmp_path / "backbone.safetensors"
        save_file(state, path, metadata={"format": FORMAT, "info": json.dumps(document)})
        with pytest.raises(CheckpointError, match=r"its metadata is damaged"):
            load_backbone(path)


def test_a_loss_that_falls_from_high_is_no_divergence() -> None:
    watch = divergence.DivergenceWatch(10, settled=2, slower="lr=1")
    said = [watch({"loss": loss, "lr": 0.1}, step) for step, loss in enumerate([50, 40, 30, 20, 19.5, 25, 5, 3.4, 3.3])]
    assert [text is not None for text in said] == [False, False, False, False, True, False, False, False, False]  # once


def test_a_list_of_labelled_images_that_cannot_be_read_is_named(shapes: Path, tmp_path: Path) -> None:
    images = open_split(DataRecipe(name="x", root=str(shapes)), "train")
    for name, content, said in (
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: truncated or not a gzip file"),
        ("b.txt", b"a.png\n\xff\xfe.png\n", r"b\.txt, line 2: the byte 0xff is not valid UTF-8"),
        ("c.txt", b"\n", r"c\.txt: empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            listed_subset(images, tmp_path / name)


def test_a_protocol_that_does_not_measure_its_headline_is_refused(
    shapes: Path, tmp_path: Path, resnet18: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixmask.transfer.protocols.knn import KnnRecipe

    monkeypatch.setattr(KnnRecipe, "measure", lambda self, setting: {"knn/acc": 1.0})
    plan = make_plan(KNN, shapes, tmp_path, resnet18)
    with pytest.raises(RunFailure, match=r"measured knn/acc, and its headlines are knn/top1"):
        stage.run(plan)
    assert not plan.run.is_finished
