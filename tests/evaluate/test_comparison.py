from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixmask.engine.errors import UserError
from mixmask.engine.predictions import CLASSES, MATCHES, ClassPredictions, DetectionMatches
from mixmask.engine.records import Record
from mixmask.evaluate.collect import Collection, Run, collect
from mixmask.evaluate.comparison import chosen, compare, compare_runs
from tests.evaluate.made import backbone, laboratory, transfer, write


def collection(records: list[Record]) -> Collection:
    return Collection(Path("runs"), tuple(Run(Path(f"r/{n}"), record) for n, record in enumerate(records)), (), ())


def test_methods_are_compared_where_they_were_measured_alike() -> None:
    lab = collection(laboratory())
    found = compare(chosen(lab, "mixmask"), chosen(lab, "vanilla"))
    whole = [one for one in found if one.what == "CIFAR-100, kNN, top-1" and one.result.n == (5, 5)]
    assert len(whole) == 1
    assert whole[0].result.paired
    assert "mix.grid 2" in whole[0].first
    assert whole[0].second == "Vanilla (MoCo, 1,000 epochs)"
    voc = [one for one in found if one.what == "VOC 2007, detection, box AP"]
    assert [one.result.n for one in voc] == [(5, 5)]  # the other engine's run has nothing to be compared with
    assert not any("1,000 epochs" in one.first and "200 epochs" in one.second for one in found)


def test_seeds_pair_only_if_they_are_the_same() -> None:
    def runs(method: str, seeds: range) -> list[Record]:
        return [
            transfer(backbone(method=method, seed=seed), "knn", {"knn/top1": 60.0 + seed % 3 + len(method)})
            for seed in seeds
        ]

    same = collection(runs("mixmask", range(4)) + runs("vanilla", range(4)))
    other = collection(runs("mixmask", range(4)) + runs("vanilla", range(1, 5)))
    for lab, paired in ((same, True), (other, False)):
        (found,) = compare(chosen(lab, "mixmask"), chosen(lab, "vanilla"))
        assert found.result.paired is paired
        assert (found.result.p is None) or paired


def test_conditions_choose_runs_and_unknown_ones_are_refused() -> None:
    lab = collection(laboratory())
    (found,) = compare(chosen(lab, "grid_size == 4"), chosen(lab, "grid_size == 2 and mask_ratio == '0.25'"))
    assert found.result.value == pytest.approx(1.0)
    with pytest.raises(UserError, match="methods there: random, vanilla, mixmask, mixmask\\+unmix, unmix"):
        chosen(lab, "mscn")
    with pytest.raises(UserError, match="no column 'nonsense'"):
        chosen(lab, "nonsense > 3")


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two kNN runs with their predictions."""
    records = [transfer(backbone(method=method), "knn", {"knn/top1": 50.0}) for method in ("mixmask", "vanilla")]
    write(records, tmp_path)
    labels = np.arange(200) % 10
    folders = []
    for record, wrong in zip(records, (40, 80), strict=True):
        folder = tmp_path / "transfer" / f"{record.name}-{record.fingerprint}"
        predicted = np.where(np.arange(200) < wrong, (labels + 1) % 10, labels)
        ClassPredictions("split", labels, predicted).write(folder / CLASSES)
        folders.append(folder)
    return folders


def test_two_runs_are_compared_by_their_predictions(pair: list[Path]) -> None:
    (found,) = compare_runs(*pair)
    assert found.values == (80.0, 60.0)
    assert found.low < 20.0 < found.high
    assert found.words().startswith("knn/top1 80.0 against 60.0: +20.0, 95 % CI [")


def test_runs_that_cannot_be_compared_say_why(pair: list[Path], tmp_path: Path) -> None:
    detector = transfer(backbone(), "detect_voc", {"bbox/AP": 1.0})
    write([detector, backbone()], tmp_path)
    folder = tmp_path / "transfer" / f"{detector.name}-{detector.fingerprint}"
    with pytest.raises(UserError, match="not comparable"):
        compare_runs(pair[0], folder)
    with pytest.raises(UserError, match="save_predictions"):
        compare_runs(folder, folder)
    with pytest.raises(UserError, match="not the folder of a finished run"):
        compare_runs(pair[0], tmp_path)
    with pytest.raises(UserError, match="a pretraining run"):
        compare_runs(next((tmp_path / "pretrain").iterdir()), pair[0])
    ClassPredictions("other", np.arange(200) % 10, np.zeros(200, dtype=np.int64)).write(pair[1] / CLASSES)
    with pytest.raises(UserError, match="different images"):
        compare_runs(*pair)
    (pair[1] / CLASSES).write_bytes((pair[0] / CLASSES).read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        compare_runs(*pair)


def test_detectors_are_compared_by_their_matches(tmp_path: Path) -> None:
    folders = []
    for number, method in enumerate(("mixmask", "vanilla")):
        record = transfer(backbone(method=method), "detect_coco", {"bbox/AP": 1.0})
        write([record], tmp_path)
        folders.append(tmp_path / "transfer" / f"{record.name}-{record.fingerprint}")
        found = np.ones((10, 6), dtype=bool)
        found[:, : 2 * number] = False
        objects = np.ones((6, 1), dtype=np.int32)
        matches = DetectionMatches(
            "split",
            "coco",
            np.arange(0.5, 1, 0.05),
            np.arange(6),
            np.zeros(6, dtype=np.int64),
            found,
            ~found & False,
            objects,
        )
        for file in MATCHES.values():
            matches.write(folders[-1] / file)
    found = compare_runs(*folders, metrics=["segm/AP50"])
    assert [one.metric for one in found] == ["segm/AP50"]
    assert found[0].values[0] == 100.0
    assert found[0].low >= 0
    with pytest.raises(UserError, match="valid for these runs: bbox/AP, bbox/AP50, bbox/AP75"):
        compare_runs(*folders, metrics=["bbox/AP90"])


def test_collections_from_disk_are_compared(tmp_path: Path) -> None:
    lab = collect(write(laboratory(), tmp_path))
    assert compare(chosen(lab, "unmix"), chosen(lab, "vanilla"))


def test_a_recipe_in_both_groups_is_refused() -> None:
    records = [transfer(backbone(seed=seed), "knn", {"knn/top1": 70.0 + 10 * seed}) for seed in range(4)]
    records += [transfer(backbone(method="vanilla", seed=seed), "knn", {"knn/top1": 50.0 + seed}) for seed in range(4)]
    lab = collection(records)
    second = chosen(lab, "method == 'vanilla' or pretrain_seed >= 2")
    with pytest.raises(UserError, match="both groups have runs of one backbone recipe"):
        compare(chosen(lab, "method == 'mixmask' and pretrain_seed < 2"), second)


def test_another_metric_is_named() -> None:
    lab = collection(laboratory())
    (found,) = compare(chosen(lab, "mixmask"), chosen(lab, "vanilla"), ["linear/top5"])
    assert found.what == "ImageNet-1K, linear, top-5"


def test_runs_on_one_backbone_each_are_said_to_be() -> None:
    lab = collection(laboratory())
    found = {one.what: one for one in compare(chosen(lab, "mixmask"), chosen(lab, "vanilla"), ["bbox/AP", "knn/top1"])}
    assert "pretraining does not vary" in found["VOC 2007, detection, box AP"].words()
    assert "pretraining does not vary" not in found["CIFAR-100, kNN, top-1"].words()


def test_a_misspelt_method_or_folder_is_named() -> None:
    lab = collection(laboratory())
    with pytest.raises(
        UserError, match=r"vanila: no transfer run below .* has this method; methods there: random, vanilla"
    ):
        chosen(lab, "vanila")
    with pytest.raises(UserError, match="runs/transfer/x: no such run folder"):
        chosen(lab, "runs/transfer/x")
