"""Protocols on frozen features: kNN, logistic regression, SVMs, few-shot; and the cache of features."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from mixmask.engine import knn as engine_knn
from mixmask.engine.errors import ConfigError, DataError, RunDirectoryError
from mixmask.engine.images import Images
from mixmask.engine.knn import knn_votes, normalize_
from mixmask.engine.ownership import Owner
from mixmask.transfer import features as feature_cache
from mixmask.transfer import stage
from mixmask.transfer.classification import trunk_of
from mixmask.transfer.features import FILE, frozen_features
from mixmask.transfer.logistic import fit_logistic
from mixmask.transfer.recipe import load_transfer_recipe
from mixmask.transfer.scores import average_precision, mean_average_precision, mean_per_class
from tests.engine.benchmark_data import write_voc2007
from tests.processes import finish, processes

DATA = "data: {name: shapes, root: ROOT, train: train, test: val, storage: resident}\nevaluation: {resize: null, crop: 32}\n"
KNN = f"protocol: knn\nname: knn\n{DATA}k: 5\n"
LOGREG = f"protocol: logreg\nname: logreg\n{DATA}num_c: 5\nmin_c: 0.01\nmax_c: 100\niterations: 200\n"
FEW = f"protocol: few_shot\nname: few\n{DATA}ways: 3\nshots: 2\nqueries: 3\nepisodes: 50\n"


def make_plan(text: str, root: Path, tmp_path: Path, backbone: Path, *overrides: str, runs: str = "runs") -> Any:
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("ROOT", str(root)))
    return stage.plan(load_transfer_recipe(config, [f"backbone={backbone}", *overrides]), tmp_path / runs)


class Setting:
    """As much of a setting as features need."""

    def __init__(self, plan: Any) -> None:
        self.device, self.normalization, self.source = plan.device, plan.normalization, plan.source


def features_of(plan: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and test features and labels, in float64."""
    found = []
    for images in (plan.train, plan.test):
        features, labels = frozen_features(plan.recipe, Setting(plan), images, lambda: trunk_of(Setting(plan)).eval())
        found += [features.double().numpy(), labels.numpy()]
    return tuple(found)


# --- kNN -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), bank=st.integers(1, 40), queries=st.integers(1, 9), k=st.integers(1, 12),
    block=st.integers(1, 50), temperature=st.sampled_from([0.01, 0.07, 1.0]),
)  # fmt: skip
def test_votes_are_scikit_learns(seed: int, bank: int, queries: int, k: int, block: int, temperature: float) -> None:
    """Whatever the size of the blocks in which the bank is gone through."""
    rng = torch.Generator().manual_seed(seed)
    features, asked = (normalize_(torch.randn(n, 4, generator=rng, dtype=torch.float64)) for n in (bank, queries))
    labels = torch.randint(0, 3, (bank,), generator=rng)
    labels[0] = 2
    before, engine_knn.BLOCK = engine_knn.BLOCK, block
    try:
        votes = knn_votes(features, labels, asked, num_classes=3, ks=[1, k], temperatures=[temperature, 0.5], chunk=4)
    finally:
        engine_knn.BLOCK = before
    for (number, softness), found in votes.items():
        model = KNeighborsClassifier(
            min(number, bank), algorithm="brute", metric="cosine",
            weights=lambda distance, softness=softness: np.exp((1 - distance - 1) / softness),
        )  # fmt: skip
        model.fit(features.numpy(), labels.numpy())
        assert found.tolist() == model.predict(asked.numpy()).tolist()


def test_every_k_and_temperature_is_recorded(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    record = stage.run(make_plan(KNN, shapes, tmp_path, resnet18))
    assert {key for key in record.metrics if key != "knn/top1"} == {
        f"knn/top1/k={k},T={t}" for k in (5, 10, 20, 100) for t in (0.07, 0.1)
    }  # 200 neighbours are more than the 120 training images
    assert record.metrics["knn/top1"] == record.metrics["knn/top1/k=5,T=0.1"]
    alone = stage.run(make_plan(KNN, shapes, tmp_path, resnet18, "k=20", "temperature=0.07"))
    assert record.metrics["knn/top1/k=20,T=0.07"] == alone.metrics["knn/top1"]


@pytest.mark.slow
def test_the_bank_shared_out_over_processes_gives_the_same_votes(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(KNN.replace("ROOT", str(shapes)))
    records = []
    for count in (1, 3):
        cache = f"feature_cache={tmp_path / 'cache'}" if count == 3 else "log_every=1"
        done = finish(
            processes(
                count, "transfer", str(config), f"backbone={resnet18}", cache, "--run-dir", str(tmp_path / str(count))
            )
        )
        assert [code for code, _, _ in done] == [0] * count, done
        records.append(stage.Record.read(tmp_path / str(count) / "record.json"))
    assert records[1].environment["world_size"] == 3
    assert records[1].metrics == records[0].metrics


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_features_are_extracted_once_for_all_protocols(
    shapes: Path, tmp_path: Path, resnet18: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"feature_cache={tmp_path / 'cache'}"
    without = stage.run(make_plan(KNN, shapes, tmp_path, resnet18, runs="without"))
    assert stage.run(make_plan(KNN, shapes, tmp_path, resnet18, cache)).metrics == without.metrics
    assert len(list((tmp_path / "cache").glob(f"*/{FILE}"))) == 2  # of the training and the test images

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("the features are in the cache")

    monkeypatch.setattr(feature_cache, "extract_features", never)
    stage.run(make_plan(LOGREG, shapes, tmp_path, resnet18, cache))
    stage.run(make_plan(FEW, shapes, tmp_path, resnet18, cache))
    for change in ("evaluation.crop=24", "precision=bf16", "feature_dtype=fp16", "normalization=cifar10"):
        with pytest.raises(AssertionError, match="in the cache"):  # other features
            stage.run(make_plan(KNN, shapes, tmp_path, resnet18, cache, change))
    shutil.copytree(shapes, tmp_path / "changed")
    path = next((tmp_path / "changed" / "val").glob("*/*"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(AssertionError, match="in the cache"):  # other images under the same names
        stage.run(make_plan(KNN, tmp_path / "changed", tmp_path, resnet18, cache, runs="changed"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_features_are_extracted_again(damage: str, shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    cache = f"feature_cache={tmp_path / 'cache'}"
    first = stage.run(make_plan(KNN, shapes, tmp_path, resnet18, cache))
    for file in (tmp_path / "cache").glob(f"*/{FILE}"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"no features")
    assert stage.run(make_plan(KNN, shapes, tmp_path, resnet18, cache, runs="again")).metrics == first.metrics


@pytest.mark.slow
def test_a_second_job_waits_for_the_features_of_the_first(
    shapes: Path, tmp_path: Path, resnet18: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is held by somebody who lives; while this job waits, the features appear."""
    cache = f"feature_cache={tmp_path / 'cache'}"
    first = stage.run(make_plan(KNN, shapes, tmp_path, resnet18, cache))
    (one, *_) = sorted((tmp_path / "cache").iterdir())
    (one / FILE).rename(tmp_path / "kept")
    waited = []

    acquire = Owner.acquire

    def held(owner: Owner) -> None:
        if not waited and owner.file.parent == one:
            raise RunDirectoryError(f"{owner.file}: job 7 works there")
        acquire(owner)

    def appears(seconds: float) -> None:
        waited.append(seconds)
        (tmp_path / "kept").rename(one / FILE)

    monkeypatch.setattr(Owner, "acquire", held)
    monkeypatch.setattr(feature_cache, "time", SimpleNamespace(sleep=appears))
    again = stage.run(make_plan(KNN, shapes, tmp_path, resnet18, cache, runs="again"))
    assert waited == [feature_cache.POLL_SECONDS]
    assert again.metrics == first.metrics


@pytest.mark.slow
def test_half_precision_features_are_rounded_alike_with_and_without_a_cache(
    shapes: Path, tmp_path: Path, resnet18: Path
) -> None:
    one = stage.run(make_plan(KNN, shapes, tmp_path, resnet18, "feature_dtype=bf16"))
    two = stage.run(
        make_plan(KNN, shapes, tmp_path, resnet18, "feature_dtype=bf16", f"feature_cache={tmp_path / 'c'}", runs="b")
    )
    assert one.metrics == two.metrics


# --- logistic regression ---------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num=st.integers(10, 60),
    classes=st.integers(3, 5),
    decay=st.sampled_from([1e-3, 0.1, 1.0]),
)
def test_logistic_regression_is_scikit_learns(seed: int, num: int, classes: int, decay: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(num, 6, generator=rng, dtype=torch.float64)
    labels = torch.arange(num) % classes
    head = torch.nn.Linear(6, classes, dtype=torch.float64)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    fit_logistic(features, labels, head, weight_decay=decay, iterations=2000, tolerance=1e-9)
    model = LogisticRegression(C=1 / (num * decay), max_iter=10_000, tol=1e-10).fit(features.numpy(), labels.numpy())
    theirs = model.predict_proba(features.numpy())
    with torch.no_grad():
        assert np.allclose(head(features).softmax(dim=1).numpy(), theirs, atol=1e-4)


def test_binary_problems_of_multi_label_images_are_scikit_learns() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 2, (50, 3), generator=rng)
    weights = (torch.rand(50, 3, generator=rng) > 0.2).double()
    head = torch.nn.Linear(6, 3, dtype=torch.float64)
    fit_logistic(features, labels, head, weight_decay=1 / 50, iterations=2000, weights=weights, tolerance=1e-10)
    for column in range(3):
        known = weights[:, column] > 0
        model = LogisticRegression(C=1.0, max_iter=10_000, tol=1e-10)
        model.fit(features[known].numpy(), labels[known, column].numpy())
        assert np.allclose(head.weight[column].detach().numpy(), model.coef_[0], atol=1e-4)


@pytest.mark.slow
def test_logreg_chooses_c_on_held_out_training_images(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    plan = make_plan(LOGREG, shapes, tmp_path, resnet18)
    record = stage.run(plan)
    held = {key: value for key, value in record.metrics.items() if key.startswith("logreg/held_out/")}
    assert len(held) == 5
    features, labels, asked, answers = features_of(plan)
    model = LogisticRegression(C=record.metrics["logreg/chosen_C"], max_iter=5000).fit(features, labels)
    assert record.metrics["logreg/top1"] == pytest.approx(100 * model.score(asked, answers), abs=2.6)
    # A choice that does not see test labels stays the same when they are shuffled.
    shuffled = replace(plan.test, targets=plan.test.targets[::-1].copy())
    again = make_plan(LOGREG, shapes, tmp_path, resnet18, runs="shuffled")
    other = stage.run(replace(again, test=shuffled))
    assert {key: other.metrics[key] for key in held} == held
    assert other.metrics["logreg/chosen_C"] == record.metrics["logreg/chosen_C"]


def test_logreg_knows_the_metrics_of_benchmarks(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    record = stage.run(make_plan(LOGREG, shapes, tmp_path, resnet18, "metric=mean_per_class", "num_c=1", "max_c=0.01"))
    assert record.headlines == {"logreg/mean_per_class": "logreg mean per class"}
    assert record.metrics["logreg/mean_per_class"] == pytest.approx(
        record.metrics["logreg/top1"]
    )  # 4 images in each class
    with pytest.raises(
        ConfigError, match="metric mAP: the images of 'shapes' have one label each; valid: top1, mean_per"
    ):
        make_plan(LOGREG, shapes, tmp_path, resnet18, "metric=mAP")
    with pytest.raises(ConfigError, match="min_c 5 must be below max_c 1"):
        make_plan(LOGREG, shapes, tmp_path, resnet18, "min_c=5", "max_c=1")


# --- scores ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30).filter(any), st.integers(0, 1000))
def test_average_precision_is_its_definition(present: list[bool], seed: int) -> None:
    scores = np.random.default_rng(seed).permutation(len(present)).astype(float)
    truth = np.array(present)
    order = np.argsort(-scores)
    precision, recall, right = [], [], 0
    for number, index in enumerate(order, 1):
        right += present[index]
        precision.append(right / number)
        recall.append(right / truth.sum())
    levels = np.arange(0, 1.1, 0.1)  # as Detectron2's loop rounds them
    points = [max((p for p, r in zip(precision, recall) if r >= level), default=0) for level in levels]
    assert average_precision(scores, truth) == pytest.approx(sum(points) / 11)
    area = sum(
        (r - before) * max(p for p, other in zip(precision, recall) if other >= r)
        for r, before in zip(recall, [0, *recall[:-1]])
    )
    assert average_precision(scores, truth, points=False) == pytest.approx(area)


def test_scores_leave_out_what_does_not_count() -> None:
    assert mean_per_class(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 2])) == pytest.approx(50.0)
    scores = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]])
    labels = torch.tensor([[1, 0], [-1, 0], [0, 0]], dtype=torch.int8)
    assert mean_average_precision(scores, labels) == pytest.approx(100.0)  # the second class is in no image


# --- VOC 2007: SVMs and multi-label logistic regression --------------------------------------------------------------

VOC = "data: {name: voc2007, root: ROOT, num_workers: 0}\nevaluation: {resize: 32, crop: 32}\n"
SVM = f"protocol: svm_voc07\nname: svm\n{VOC}costs: [0.1, 1]\nfolds: 2\nlow_shot: [1, 2]\nlow_shot_samples: 2\n"


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc2007(tmp_path_factory.mktemp("voc"), num=24)


@pytest.mark.slow
def test_svms_are_scikit_learns(voc: Path, tmp_path: Path, resnet18: Path) -> None:
    plan = make_plan(SVM, voc, tmp_path, resnet18)
    record = stage.run(plan)
    features, labels, asked, answers = features_of(plan)
    features, asked = (part / (np.linalg.norm(part, axis=1, keepdims=True) + 1e-5) for part in (features, asked))
    found = []
    for label in range(3):
        known = labels[:, label] >= 0
        cost = record.metrics[f"svm/chosen_C/{plan.train.classes[label]}"]
        model = LinearSVC(C=cost, class_weight={0: 1, 1: 2}, dual=False, tol=1e-8, max_iter=100_000)
        model.fit(features[known], labels[known, label])
        counts = answers[:, label] >= 0
        found.append(average_precision(model.decision_function(asked)[counts], answers[counts, label] == 1))
    assert record.metrics["svm/mAP"] == pytest.approx(100 * np.mean(found), abs=1.0)
    assert {"svm/mAP_area", "svm/low_shot/1", "svm/low_shot/2", "svm/low_shot_std/1"} <= record.metrics.keys()
    again = stage.run(make_plan(SVM, voc, tmp_path, resnet18, runs="again"))
    assert again.metrics == record.metrics


def test_multi_label_images_go_to_the_protocols_that_can(
    voc: Path, tmp_path: Path, resnet18: Path, shapes: Path
) -> None:
    record = stage.run(make_plan(LOGREG.replace(DATA, VOC), voc, tmp_path, resnet18, "metric=mAP"))
    assert 0 < record.metrics["logreg/mAP"] <= 100
    assert record.settings["C"] == "best of 5 on official validation split"
    for text in (KNN, FEW):
        with pytest.raises(
            ConfigError, match=r"several labels each, and this protocol needs one; use logreg \(metric=mAP\)"
        ):
            make_plan(text.replace(DATA, VOC), voc, tmp_path, resnet18)
    with pytest.raises(ConfigError, match="metric top1: the images of 'voc2007' have several labels each; valid: mAP"):
        make_plan(LOGREG.replace(DATA, VOC), voc, tmp_path, resnet18)
    with pytest.raises(ConfigError, match="measures mAP of multi-label images; use logreg or linear"):
        make_plan(SVM.replace(VOC, DATA), shapes, tmp_path, resnet18)
    with pytest.raises(ConfigError, match=r"low_shot 50: class '\w+' is in \d+ training images"):
        make_plan(SVM, voc, tmp_path, resnet18, "low_shot=[50]")
    with pytest.raises(DataError, match=r"VOC 2007 has a test split; leave data\.holdout out"):
        make_plan(LOGREG.replace(DATA, VOC), voc, tmp_path, resnet18, "metric=mAP", "data.holdout=0.2")


# --- few-shot --------------------------------------------------------------------------------------------------------


def test_few_shot_is_the_nearest_mean(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    plan = make_plan(FEW, shapes, tmp_path, resnet18)
    record = stage.run(plan)
    assert record.protocol == "few_shot_3_way_2_shot"
    assert 100 / 3 < record.metrics["few_shot/top1"] <= 100
    assert 0 < record.metrics["few_shot/interval"] < 15
    features, labels, asked, answers = features_of(plan)
    everything = torch.from_numpy(np.concatenate([features, asked]))
    wanted = torch.from_numpy(np.concatenate([labels, answers]))
    of_class = [(wanted == label).nonzero().flatten() for label in range(10)]
    scores = []
    for number in range(50):
        from mixmask.engine.randomness import generator

        draws = generator(0, "episode", number)
        classes = torch.randperm(10, generator=draws)[:3].tolist()
        picked = [of_class[c][torch.randperm(len(of_class[c]), generator=draws)[:5]] for c in classes]
        means = [everything[rows[:2]].mean(0) for rows in picked]
        right = 0
        for place, rows in enumerate(picked):
            for row in rows[2:]:
                distances = [float(((everything[row] - mean) ** 2).sum()) for mean in means]
                right += distances.index(min(distances)) == place
        scores.append(100 * right / 9)
    assert record.metrics["few_shot/top1"] == pytest.approx(np.mean(scores), abs=0.5)
    assert record.metrics["few_shot/interval"] == pytest.approx(1.96 * np.std(scores, ddof=1) / 50**0.5, abs=0.2)


def test_too_few_images_for_an_episode(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(ConfigError, match=r"shots 14 and queries 3 need 17 images of a class; 0 classes .* has 16\)"):
        make_plan(FEW, shapes, tmp_path, resnet18, "shots=14")
    with pytest.raises(ConfigError, match="ways 11 is larger than the 10 classes"):
        make_plan(FEW, shapes, tmp_path, resnet18, "ways=11")
    assert isinstance(make_plan(FEW, shapes, tmp_path, resnet18, "shots=13").train, Images)
