"""Saved classifiers on shifted images, and their calibration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.errors import CheckpointError, ConfigError, DataError, UserError
from mixmask.transfer import stage
from mixmask.transfer.classifier_file import FILE, load_classifier
from mixmask.transfer.protocols.robustness import ALEXNET, accuracy, calibration_error
from mixmask.transfer.recipe import load_transfer_recipe
from tests.conftest import make_backbone

DATA = "data: {name: shapes, root: ROOT, train: train, test: val}\nevaluation: {resize: null, crop: 32}\n"
LINEAR = f"protocol: linear\nname: lin\n{DATA}augment: null\nlr: 1\nbatch_size: 32\nepochs: 5\nmilestones: [4]\n"
SEMISUP = (
    f"protocol: semisup\nname: semi\n{DATA}augment: {{crop: 32}}\nlabels: 50\nlr_trunk: 0.01\nlr_head: 0.1\n"
    "batch_size: 16\nepochs: 1\nmilestones: []\n"
)
ROBUST = f"protocol: robustness\nname: robust\n{DATA}".replace("test: val}", "test: val, num_workers: 0}")


def make_plan(text: str, root: Path, tmp_path: Path, backbone: Path, *overrides: str) -> Any:
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("ROOT", str(root)))
    return stage.plan(load_transfer_recipe(config, [f"backbone={backbone}", *overrides]), tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "overrides", "metric"),
    [
        (LINEAR, [], "linear/top1"),
        (LINEAR, ["lr=[0.1,1]", "batch_norm=[false,true]"], "linear/top1"),
        (
            LINEAR.replace("augment: null", "augment: {crop: 32}"),
            ["batch_norm=true", "epochs=1", "milestones=[]"],
            "linear/top1",
        ),
        (SEMISUP, [], "semisup/top1"),
    ],
)
def test_a_saved_classifier_answers_as_it_was_tested(
    text: str, overrides: list[str], metric: str, shapes: Path, tmp_path: Path, resnet18: Path
) -> None:
    plan = make_plan(text, shapes, tmp_path, resnet18, "save_classifier=true", *overrides)
    trained = stage.run(plan)
    robust = stage.run(make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={plan.run.path / FILE}"))
    assert robust.metrics["robustness/top1"] == pytest.approx(trained.metrics[metric])
    assert 0 <= robust.metrics["robustness/ece"] <= 100
    assert robust.settings["classifier_run"] == trained.fingerprint
    again = make_plan(text, shapes, tmp_path, resnet18, *overrides)
    assert again.fingerprint == plan.fingerprint  # saving changes no number


@pytest.fixture
def classifier(shapes: Path, tmp_path: Path, resnet18: Path) -> Path:
    plan = make_plan(LINEAR, shapes, tmp_path, resnet18, "save_classifier=true")
    stage.run(plan)
    return plan.run.path / FILE


def test_shifted_sets_with_some_classes_and_with_numbers(
    classifier: Path, shapes: Path, tmp_path: Path, resnet18: Path
) -> None:
    names = sorted(path.name for path in (shapes / "val").iterdir())
    for name in names[:4]:  # as ImageNet-A: folders of some classes
        shutil.copytree(shapes / "val" / name, tmp_path / "some" / name)
    for number, name in enumerate(names):  # as ImageNet-V2: folders are numbers of classes
        shutil.copytree(shapes / "val" / name, tmp_path / "numbers" / str(number))
    sets = f"sets={{imagenet_a: {tmp_path / 'some'}, imagenet_v2: {tmp_path / 'numbers'}}}"
    plan = make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={classifier}", sets)
    record = stage.run(plan)
    assert record.metrics["robustness/imagenet_v2"] == record.metrics["robustness/top1"]
    assert [*record.headlines] == ["robustness/top1", "robustness/imagenet_a", "robustness/imagenet_v2"]
    model, info = load_classifier(classifier, torch.device("cpu"))
    right = []
    for label, name in enumerate(names[:4]):
        for path in sorted((tmp_path / "some" / name).iterdir()):
            from mixmask.engine.decoding import decode
            from mixmask.engine.normalization import normalize

            with torch.no_grad():
                logits = model(normalize(decode(path)[None], info.normalization))[
                    0, :4
                ]  # the answer is one of four classes
            right.append(int(logits.argmax()) == label)
    assert record.metrics["robustness/imagenet_a"] == pytest.approx(100 * sum(right) / len(right))
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "some", moved)
    other = make_plan(
        ROBUST,
        shapes,
        tmp_path,
        resnet18,
        f"classifier={classifier}",
        f"sets={{imagenet_a: {moved}, imagenet_v2: {tmp_path / 'numbers'}}}",
    )
    assert other.fingerprint == plan.fingerprint


@pytest.mark.slow
def test_mce_is_relative_to_alexnet(classifier: Path, shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    root = tmp_path / "imagenet-c"
    for corruption in ALEXNET:
        for severity in "12345":
            (root / "kinds" / corruption).mkdir(parents=True, exist_ok=True)
            (root / "kinds" / corruption / severity).symlink_to(shapes / "val")
    record = stage.run(make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={classifier}", f"corruptions={root}"))
    error = 100 - record.metrics["robustness/top1"]
    assert record.metrics["robustness/error/fog"] == pytest.approx(error)
    assert record.metrics["robustness/mCE"] == pytest.approx(sum(error / value for value in ALEXNET.values()) / 15)
    shutil.rmtree(root / "kinds" / "fog")
    with pytest.raises(DataError, match="mCE needs all 15 corruptions; missing: fog"):
        make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={classifier}", f"corruptions={root}")


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), num=st.integers(1, 40), bins=st.integers(1, 20))
def test_calibration_against_a_loop(seed: int, num: int, bins: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits, labels = 3 * torch.randn(num, 4, generator=rng), torch.randint(0, 4, (num,), generator=rng)
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits, labels.tolist(), strict=True):
        confidence, predicted = row.softmax(0).max(0)
        for number in range(bins):
            if number / bins < float(confidence) <= (number + 1) / bins:
                members.setdefault(number, []).append((float(confidence), int(predicted) == label))
    expected = sum(
        len(own) / num * abs(sum(right for _, right in own) / len(own) - sum(sure for sure, _ in own) / len(own))
        for own in members.values()
    )
    assert calibration_error(logits, labels, bins) == pytest.approx(expected, abs=1e-5)


def test_accuracy_is_among_the_classes_that_occur() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]])
    assert accuracy(logits, torch.tensor([2, 0])) == 50.0
    assert accuracy(logits, torch.tensor([1, 2])) == 50.0


def test_the_config_that_comes_with_the_project(classifier: Path) -> None:
    recipe = load_transfer_recipe(
        configs_folder() / "transfer" / "robustness.yaml", ["backbone=b", f"classifier={classifier}"]
    )
    assert (recipe.evaluation.resize, recipe.evaluation.crop) == (None, 32)


def test_the_view_is_the_classifiers_own(classifier: Path, shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation\.crop: is the classifier's own \(32\); leave it out \(given: 24\)"
    ):
        make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={classifier}", "evaluation.crop=24")


def test_what_is_refused(classifier: Path, shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file; linear probes and finetuning write one"):
        make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={tmp_path / 'absent'}")
    with pytest.raises(CheckpointError, match="is no classifier"):
        make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={resnet18}")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(classifier.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={cut}")
    other = make_backbone(tmp_path / "other.safetensors", seed=5)
    with pytest.raises(ConfigError, match="was trained from another backbone"):
        make_plan(ROBUST, shapes, tmp_path, other, f"classifier={classifier}")
    with pytest.raises(DataError, match=r"no such folder \(sets\.a\)"):
        make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={classifier}", f"sets={{a: {tmp_path / 'none'}}}")
    shutil.copytree(shapes / "val", tmp_path / "strange")
    (tmp_path / "strange" / sorted(path.name for path in (shapes / "val").iterdir())[0]).rename(
        tmp_path / "strange" / "zebra"
    )
    with pytest.raises(DataError, match="1 of its class folders are not classes of the classifier: zebra"):
        make_plan(ROBUST, shapes, tmp_path, resnet18, f"classifier={classifier}", f"sets={{a: {tmp_path / 'strange'}}}")


def test_other_images_under_the_same_names_are_another_measurement(
    classifier: Path, shapes: Path, tmp_path: Path, resnet18: Path
) -> None:
    """A finished run is not reused for them, whatever folder they lie in, and damaged ones are found before the start."""
    for folder in ("one", "two"):
        shutil.copytree(shapes / "val", tmp_path / folder)
    given = [f"classifier={classifier}", f"sets={{blurred: {tmp_path / 'one'}}}"]
    stage.run(make_plan(ROBUST, shapes, tmp_path, resnet18, *given))
    other = make_plan(ROBUST, shapes, tmp_path, resnet18, given[0], f"sets={{blurred: {tmp_path / 'two'}}}")
    assert other.finished() is not None  # copies are the same images
    path = next((tmp_path / "two").glob("*/*"))
    path.write_bytes(path.read_bytes()[:200])
    changed = make_plan(ROBUST, shapes, tmp_path, resnet18, given[0], f"sets={{blurred: {tmp_path / 'two'}}}")
    with pytest.raises(UserError, match="other data"):
        changed.finished()
    with pytest.raises(DataError, match=path.name):
        changed.train.check()
    with pytest.raises(ConfigError, match="sets: 'top1' is the name of a metric"):
        make_plan(ROBUST, shapes, tmp_path, resnet18, given[0], f"sets={{top1: {tmp_path / 'one'}}}")
