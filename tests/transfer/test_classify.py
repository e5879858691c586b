from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mixmask.engine.backbones import BackboneInfo, build_trunk, load_backbone, save_backbone
from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import identity
from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.errors import ConfigError, DataError, RunDirectoryError, RunFailure
from mixmask.engine.heads import mlp
from mixmask.engine.images import Images
from mixmask.engine.loader import BatchPlan
from mixmask.engine.normalization import normalize
from mixmask.engine.predictions import CLASSES, ClassPredictions
from mixmask.engine.randomness import derived_seed
from mixmask.engine.records import Record
from mixmask.transfer import stage
from mixmask.transfer.classifier import Classifier
from mixmask.transfer.probe import Probe
from mixmask.transfer.probes import Probes
from mixmask.transfer.protocols.linear import require_unchanged
from mixmask.transfer.recipe import load_transfer_recipe
from mixmask.transfer.subsets import balanced_subset, listed_subset
from tests.conftest import make_backbone
from tests.processes import finish, processes

DATA = "data: {name: shapes, root: ROOT, train: train, test: val, storage: resident}\nevaluation: {resize: null, crop: 32}\n"
LINEAR = (
    f"protocol: linear\nname: lin\n{DATA}augment: {{crop: 32}}\nlr: 1\nbatch_size: 32\nepochs: 2\nmilestones: [1]\n"
)
KNN = f"protocol: knn\nname: knn\n{DATA}k: 5\n"
SEMISUP = (
    f"protocol: semisup\nname: semi\n{DATA}augment: {{crop: 32}}\nlabels: 50\nlr_trunk: 0.01\nlr_head: 0.1\n"
    "batch_size: 16\nepochs: 2\n"
)


def make_plan(text: str, shapes: Path, tmp_path: Path, backbone: Path, *overrides: str) -> stage.TransferPlan:
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("ROOT", str(shapes)))
    return stage.plan(load_transfer_recipe(config, [f"backbone={backbone}", *overrides]), tmp_path / "runs")


def test_knn_record(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    record = stage.run(make_plan(KNN, shapes, tmp_path, resnet18))
    assert record.protocol == "knn"
    assert record.settings == {
        "precision": "fp32",
        "k": 5,
        "temperature": 0.1,
        "features": "trunk output, L2-normalised",
    }
    assert (record.method, record.parent) == ("mixmask", "testresnet180")


@pytest.mark.slow
@pytest.mark.parametrize(("text", "metric"), [(KNN, "knn/top1"), (LINEAR, "linear/top1")])
def test_what_was_predicted_is_kept_for_comparisons(
    text: str, metric: str, shapes: Path, tmp_path: Path, resnet18: Path
) -> None:
    plan = make_plan(text, shapes, tmp_path, resnet18)
    record = stage.run(plan)
    kept = ClassPredictions.read(plan.run.path / CLASSES)
    assert 100 * (kept.predicted == kept.labels).mean() == pytest.approx(record.metrics[metric])
    assert kept.images == record.data["test"]
    assert isinstance(plan.test, Images)
    assert kept.labels.tolist() == plan.test.labels.tolist()
    silent = make_plan(text, shapes, tmp_path, resnet18, "save_predictions=false", "seed=1")
    stage.run(silent)
    assert not (silent.run.path / CLASSES).exists()


def test_the_record_keeps_both_recipes_and_what_is_expected(shapes: Path, tmp_path: Path) -> None:
    pretraining = {"mix": {"kind": "mixmask", "grid": 4}}
    state, info = load_backbone(make_backbone(tmp_path / "first.safetensors"))
    save_backbone(tmp_path / "b.safetensors", state, info.model_copy(update={"pretraining": pretraining}))
    expected = "expected={metric: knn/top1, value: 50, tolerance: 1, source: us}"
    record = stage.run(make_plan(KNN, shapes, tmp_path, tmp_path / "b.safetensors", expected))
    assert record.pretraining == pretraining
    assert record.recipe["k"] == 5
    assert "backbone" not in record.recipe
    assert [one.value for one in record.expected] == [50.0]


def test_linear_learns_from_separable_features_and_leaves_the_trunk_alone(
    shapes: Path, tmp_path: Path, resnet18: Path
) -> None:
    plan = make_plan(LINEAR, shapes, tmp_path, resnet18)
    before = {name: tensor.clone() for name, tensor in plan.source.state.items()}
    record = stage.run(plan)
    assert set(record.metrics) == {"linear/top1", "linear/top5"}
    assert record.metrics["linear/top5"] >= record.metrics["linear/top1"]
    assert all(torch.equal(before[name], plan.source.state[name]) for name in before)
    assert Record.read(plan.run.record_file) == record


def test_a_trunk_that_changed_during_the_probe_is_noticed(resnet18: Path) -> None:
    state, info = load_backbone(resnet18)
    trunk = build_trunk(info.recipe)
    trunk.load_state_dict(state)
    require_unchanged(trunk, state)
    trunk.state_dict()["layer2.0.bn1.running_mean"].add_(1e-3)
    with pytest.raises(RunFailure, match=r"layer2\.0\.bn1\.running_mean"):
        require_unchanged(trunk, state)


def test_the_frozen_trunk_stays_in_eval_mode(resnet18: Path) -> None:
    _, info = load_backbone(resnet18)
    probe = Probes(build_trunk(info.recipe), 10, [Probe(1.0, 0.0, False)]).train()
    assert probe.training
    assert not any(module.training for module in probe.trunk.modules())
    probe.loss(probe.features(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is None for parameter in probe.trunk.parameters())
    assert all(parameter.grad is not None for parameter in probe.heads.parameters())
    free = Classifier(build_trunk(info.recipe), 10).train()
    assert all(module.training for module in free.trunk.modules())


@pytest.mark.slow
def test_finetuning_uses_two_rates_and_changes_the_trunk(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    plan = make_plan(SEMISUP, shapes, tmp_path, resnet18)
    assert plan.recipe.record_name == "semisup_50"
    assert len(plan.train) == 60
    record = stage.run(plan)
    assert (record.settings["lr_trunk"], record.settings["lr_head"], record.settings["num_labelled"]) == (0.01, 0.1, 60)
    assert "semisup/top1" in record.metrics


def test_subsets_are_balanced_nested_and_seeded(shapes: Path) -> None:
    images = open_split(DataRecipe(name="x", root=str(shapes)), "train")
    small, large = balanced_subset(images, 25, 0), balanced_subset(images, 50, 0)
    assert torch.equal(torch.bincount(small.labels), torch.full((10,), 3))
    assert torch.equal(torch.bincount(large.labels), torch.full((10,), 6))
    assert set(small.paths) < set(large.paths)
    assert balanced_subset(images, 25, 0).paths == small.paths
    assert balanced_subset(images, 25, 1).paths != small.paths
    assert len(balanced_subset(images, 0.1, 0)) == 10  # at least one image of each class
    assert balanced_subset(images, 100, 0).paths == images.paths


def test_listed_subset(shapes: Path, tmp_path: Path) -> None:
    import gzip

    repeated = open_split(DataRecipe(name="x", root=str(shapes)), "train")
    images = repeated.subset((repeated.labels == 0).nonzero().flatten())
    names = sorted(path.name for path in images.paths)[:3]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    assert [path.name for path in listed_subset(images, tmp_path / "list.txt").paths] == names
    with gzip.open(tmp_path / "list.txt.gz", "wt") as file:
        file.write("\n".join(names))
    assert len(listed_subset(images, tmp_path / "list.txt.gz")) == 3
    (tmp_path / "list.txt").write_text("n01440764_10026.JPEG\n")
    with pytest.raises(DataError, match=r"names 1 of 1 files .* for example n01440764_10026\.JPEG"):
        listed_subset(images, tmp_path / "list.txt")
    with pytest.raises(DataError, match="one file name stands in several classes"):
        listed_subset(repeated, tmp_path / "list.txt")
    with pytest.raises(DataError, match="no such list"):
        listed_subset(images, tmp_path / "absent.txt")


def test_what_does_not_fit(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(ConfigError, match="larger than the 20 labelled images"):
        make_plan(SEMISUP, shapes, tmp_path, resnet18, "labels=20", "batch_size=32")
    with pytest.raises(ConfigError, match="k 200 is larger than the 120 training images"):
        make_plan(KNN, shapes, tmp_path, resnet18, "k=200")
    with pytest.raises(ConfigError, match="resize 16 is smaller than crop 32"):
        make_plan(KNN, shapes, tmp_path, resnet18, "evaluation.resize=16")
    assert not (tmp_path / "runs").exists()


def test_parents_fingerprint_is_part_of_the_identity(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    state, info = load_backbone(resnet18)
    other = tmp_path / "other.safetensors"
    save_backbone(other, state, BackboneInfo.model_validate({**info.model_dump(), "fingerprint": "another"}))
    one = make_plan(KNN, shapes, tmp_path, resnet18)
    assert one.fingerprint != make_plan(KNN, shapes, tmp_path, other).fingerprint
    assert one.fingerprint != make_plan(KNN, shapes, tmp_path, resnet18, "seed=1").fingerprint
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(resnet18.read_bytes())
    assert one.fingerprint == make_plan(KNN, shapes, tmp_path, copy).fingerprint


def test_a_foreign_checkpoint_is_labelled_by_the_user(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    state, _ = load_backbone(resnet18)
    torch.save(state, tmp_path / "theirs.pth")
    plan = make_plan(KNN, shapes, tmp_path, tmp_path / "theirs.pth", "framework=simsiam", "method=vanilla")
    record = stage.run(plan)
    assert (record.framework, record.method) == ("simsiam", "vanilla")
    plan = make_plan(KNN, shapes, tmp_path, tmp_path / "theirs.pth", "framework=byol", "method=mixmask")
    assert (stage.run(plan).framework, Record.read(plan.run.record_file).method) == ("byol", "mixmask")


def test_a_backbone_that_says_what_it_is_cannot_be_relabelled(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(ConfigError, match=r"method=vanilla: .* says itself that it is mixmask"):
        make_plan(KNN, shapes, tmp_path, resnet18, "method=vanilla")


def test_a_run_directory_of_another_backbone_is_refused(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    state, info = load_backbone(resnet18)
    other = tmp_path / "other.safetensors"
    save_backbone(other, state, BackboneInfo.model_validate({**info.model_dump(), "fingerprint": "another"}))
    first = make_plan(KNN, shapes, tmp_path, resnet18)
    stage.run(stage.plan(first.recipe, tmp_path / "runs", tmp_path / "mine"))
    with pytest.raises(RunDirectoryError, match="on another backbone"):
        stage.plan(make_plan(KNN, shapes, tmp_path, other).recipe, tmp_path / "runs", tmp_path / "mine")


def test_the_barlow_preset_is_cosine(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    recipe = make_plan(SEMISUP, shapes, tmp_path, resnet18, "preset=barlow").recipe
    assert recipe.shape == "cosine"
    assert make_plan(SEMISUP, shapes, tmp_path, resnet18).recipe.shape == "step"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "overrides"),
    [("knn", ["k=5"]), ("linear", ["batch_size=16", "epochs=2", "milestones=[1]", "lr=1"])],
)
def test_two_processes_measure_what_one_does(
    protocol: str, overrides: list[str], shapes: Path, resnet18: Path, tmp_path: Path
) -> None:
    """With a frozen trunk, nothing depends on how a batch is shared; 120 images leave an epoch's last batch of 8."""
    base = [
        "transfer",
        str(configs_folder() / "transfer" / f"{protocol}.yaml"),
        f"backbone={resnet18}",
        f"data.root={shapes}",
        "data.name=shapes",
        "data.test=val",
        "data.storage=resident",
        "evaluation.resize=null",
        "evaluation.crop=32",
        *overrides,
        *(["augment.crop=32"] if protocol == "linear" else []),
    ]
    for count in (1, 2):
        done = finish(processes(count, *base, "--run-dir", str(tmp_path / str(count))))
        assert [code for code, _, _ in done] == [0] * count, done
    one, two = (Record.read(tmp_path / str(count) / "record.json") for count in (1, 2))
    assert two.environment["world_size"] == 2
    assert two.metrics == pytest.approx(one.metrics, abs=2.6)  # one of 40 test images
    assert two.data == one.data
    kept = [ClassPredictions.read(tmp_path / str(count) / CLASSES) for count in (1, 2)]
    assert kept[0].labels.tolist() == kept[1].labels.tolist()  # in the order of the test split, however it was shared
    if protocol == "linear":
        logs = [
            [json.loads(line)["loss"] for line in (tmp_path / str(count) / "log.jsonl").read_text().splitlines()]
            for count in (1, 2)
        ]
        assert logs[1] == pytest.approx(logs[0], rel=1e-3)


# --- features of the head, fixed features, other normalisations ------------------------------------------------------


@pytest.fixture
def with_head(tmp_path: Path) -> Path:
    """A backbone file with a projection head whose output is not the trunk's."""
    plain = make_backbone(tmp_path / "plain.safetensors")
    state, info = load_backbone(plain)
    torch.manual_seed(3)
    head = mlp([512, 16, 8], norm=True)
    info = info.model_copy(update={"head": head.info})
    save_backbone(tmp_path / "backbone.safetensors", state, info, head.state_dict())
    return tmp_path / "backbone.safetensors"


def test_knn_takes_the_head_or_the_trunk(shapes: Path, tmp_path: Path, with_head: Path, resnet18: Path) -> None:
    trunk = make_plan(KNN, shapes, tmp_path, with_head)
    head = make_plan(KNN, shapes, tmp_path, with_head, "features=head")
    assert trunk.fingerprint != head.fingerprint
    assert trunk.fingerprint == make_plan(KNN, shapes, tmp_path, with_head, "features=trunk").fingerprint
    record = stage.run(head)
    assert record.settings["features"] == "projection head output, L2-normalised"
    source = head.source
    network = torch.nn.Sequential(build_trunk(source.info.recipe), mlp([512, 16, 8], norm=True)).eval()
    network[0].load_state_dict(source.state)
    network[1].load_state_dict(source.head)
    features, labels = [], []
    for images in (head.train, head.test):
        assert isinstance(images, Images)
        with torch.no_grad():
            found = network(torch.cat([normalize(images.read(i)[None]) for i in range(len(images))]))
        features.append(torch.nn.functional.normalize(found, dim=1))
        labels.append(images.labels)
    right = 0
    for query, label in zip(features[1], labels[1].tolist(), strict=True):  # the vote, written out
        similarity = (features[0] @ query).tolist()
        nearest = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:5]
        votes = dict.fromkeys(range(10), 0.0)
        for i in nearest:
            votes[int(labels[0][i])] += math.exp(similarity[i] / 0.1)
        right += max(votes, key=lambda one: votes[one]) == label
    assert record.metrics["knn/top1"] == pytest.approx(100 * right / len(labels[1]))
    with pytest.raises(ConfigError, match="holds no projection head"):
        make_plan(KNN, shapes, tmp_path, resnet18, "features=head")


def test_a_probe_on_fixed_features_is_the_loop_of_wmse(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    overrides = ["augment=null", "optimizer.kind=adam", "schedule=exponential", "lr=0.01", "final_lr=1e-6"]
    plan = make_plan(
        LINEAR, shapes, tmp_path, resnet18, *overrides, "epochs=3", "batch_size=40", "weight_decay=5e-6", "log_every=1"
    )
    record = stage.run(plan)
    trunk = build_trunk(plan.source.info.recipe).eval()
    trunk.load_state_dict(plan.source.state)
    features = []
    for images in (plan.train, plan.test):
        assert isinstance(images, Images)
        with torch.no_grad():
            features.append(trunk(torch.cat([normalize(images.read(i)[None]) for i in range(len(images))])))
    assert isinstance(plan.train, Images)
    assert isinstance(plan.test, Images)
    torch.manual_seed(derived_seed(0, "head"))
    model = Classifier(build_trunk(plan.source.info.recipe), 10)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.01, weight_decay=5e-6)
    order = BatchPlan(120, 40, drop_last=False, seed=0)
    for epoch in range(3):
        for rows in order.indices(epoch):
            optimizer.param_groups[0]["lr"] = 0.01 * (1e-6 / 0.01) ** (epoch / 3)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model.head(features[0][rows]), plan.train.labels[rows])
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = (model.head(features[1]).argmax(1) == plan.test.labels).float().mean()
    assert record.metrics["linear/top1"] == pytest.approx(100 * float(right))
    lines = [json.loads(line) for line in plan.run.log_file.read_text().splitlines()]
    assert lines[-1]["loss"] == pytest.approx(float(loss), abs=0.02)
    with pytest.raises(ConfigError, match="schedule: exponential and final_lr go together"):
        make_plan(LINEAR, shapes, tmp_path, resnet18, "schedule=exponential")


def test_a_backbone_brings_its_normalisation(shapes: Path, tmp_path: Path, resnet18: Path, coco: Path) -> None:
    state, info = load_backbone(resnet18)
    other = tmp_path / "other.safetensors"
    save_backbone(other, state, info.model_copy(update={"normalization": "cifar10", "fingerprint": "other"}))
    plan = make_plan(KNN, shapes, tmp_path, other)
    assert plan.normalization == "cifar10"
    assert make_plan(KNN, shapes, tmp_path, other, "normalization=imagenet").normalization == "imagenet"
    assert make_plan(KNN, shapes, tmp_path, resnet18).normalization == "imagenet"
    detect = configs_folder() / "transfer" / "detect_coco.yaml"
    with pytest.raises(ConfigError, match="mean and deviation of cifar10; detection takes ImageNet's only"):
        stage.plan(load_transfer_recipe(detect, [f"backbone={other}", f"data.root={coco}"]), tmp_path / "runs")


@pytest.mark.slow
def test_swavs_preset_synchronises_batch_statistics_and_its_fingerprint_says_so(
    shapes: Path, tmp_path: Path, resnet18: Path
) -> None:
    text = SEMISUP.replace("labels: 50\nlr_trunk: 0.01\nlr_head: 0.1\n", "labels: 10\n").replace(
        "batch_size: 16", "batch_size: 10"
    )
    swav, paper = (
        make_plan(text, shapes, tmp_path, resnet18, f"preset={preset}") for preset in ("swav", "paper_table")
    )
    assert (swav.recipe.sync_bn, paper.recipe.sync_bn) == (True, False)
    assert "sync_bn" in identity(swav.recipe)
    assert "sync_bn" not in identity(paper.recipe)
    off = make_plan(text, shapes, tmp_path, resnet18, "preset=swav", "sync_bn=false")
    assert off.fingerprint != swav.fingerprint
    stage.run(swav)  # one process: there is nothing to synchronise
    config = tmp_path / "config.yaml"
    done = finish(
        processes(2, "transfer", str(config), f"backbone={resnet18}", "preset=swav", "--runs", str(tmp_path / "two"))
    )
    assert [code for code, _, _ in done] == [0, 0], done
