"""Estimates: counted passes, the schedule of a suite, measured and assumed speeds, mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models import resnet50

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.config import load_recipe
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.flops import forward_flops, num_parameters
from mixmask.engine.workload import Workload
from mixmask.launch.bench.machine import Machine
from mixmask.launch.bench.training_step import TrainingStep
from mixmask.launch.estimate import model, speeds
from mixmask.launch.estimate.estimate import CellWork, describe, jobs_of, speed_of, wall_seconds
from mixmask.launch.estimate.model import Cost, cost
from mixmask.launch.estimate.speeds import PEAKS, Speed, assumed, measured
from mixmask.launch.slurm.profile import Profile, Resources
from mixmask.launch.suite.cells import Cell, expand
from mixmask.launch.suite.suite import load_suite
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.transfer.recipe import load_transfer_recipe
from tests.launch.small import KNN, MIXMASK, RANDOM, write_suite
from tests.pretrain.small_runs import CONFIG, SMALL_FRAMEWORKS

SPEED = Speed("one", "test", {(224, False): 1e12}, per_core=100.0)
MIXTURES = ("{kind: none}", "{kind: mixmask, grid: 4}", "{kind: mixmask+unmix, grid: 4}",
            "{kind: erase, grid: 4, extra_crops: 2, extra_crop: 16}")  # fmt: skip


@pytest.mark.parametrize("name", [*SMALL_FRAMEWORKS, "symmetric"])
def test_the_passes_that_a_recipe_states_are_those_of_a_step(name: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.replace("ROOT", "nowhere"))
    symmetric = "framework={kind: moco, dim: 16, queue_size: 64, momentum: 0.9, bn_splits: 1, symmetric: true}"
    framework = SMALL_FRAMEWORKS.get(name, symmetric)
    for mixture in MIXTURES:
        keys = ["backbone.arch=timm/test_resnet", framework, f"mix={mixture}"]
        step = TrainingStep(Machine(torch.device("cpu"), 0.0), load_recipe(PretrainRecipe, file, keys))
        with step.counted() as passed:
            step()
        assert (passed.with_gradient, passed.without) == pytest.approx(step.recipe.passes()), mixture


def test_operations_of_a_resnet_50() -> None:
    resnet = BackboneRecipe(arch="resnet50")
    assert forward_flops(resnet, 224) == pytest.approx(
        2 * 4.087e9, rel=0.01
    )  # torchvision states 4.09 G multiplications
    assert forward_flops(resnet, 448, 224) == pytest.approx(2 * forward_flops(resnet, 224), rel=0.01)
    without_classifier = sum(p.numel() for name, p in resnet50().named_parameters() if "fc" not in name)
    assert num_parameters(resnet) == without_classifier


def test_the_work_of_a_pretraining_run(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.replace("ROOT", "nowhere"))
    recipe = load_recipe(
        PretrainRecipe, file
    )  # 2 epochs, batch 16, MoCo v2 and MixMask: two passes with a gradient, one without
    flops = forward_flops(recipe.backbone, 32)
    work = recipe.workload(100)
    assert (work.steps, work.loaded, work.views) == (12, 192, 2)
    assert (work.trained, work.forward) == (192 * 2 * flops, 192 * flops)
    assert work.operations == 192 * 7 * flops
    monitored = load_recipe(PretrainRecipe, file, ["monitor={every_epochs: 1}", "data.storage=resident"]).workload(
        100, 50
    )
    assert (monitored.forward, monitored.loaded) == ((192 + 2 * 50) * flops, 0)
    random = load_recipe(PretrainRecipe, file, ["epochs=0"]).workload(100)
    assert random.operations == random.loaded == 0


def test_the_work_of_protocols() -> None:
    resnet, train, test = BackboneRecipe(arch="resnet50"), range(10_000), range(1_000)
    flops = forward_flops(resnet, 224)

    def work(config: str, *keys: str) -> Workload:
        recipe = load_transfer_recipe(Path(f"configs/transfer/{config}.yaml"), ["backbone=x", *keys])
        return recipe.workload(resnet, train, test)

    assert work("knn_photos").operations == 11_000 * flops
    linear = work("linear", "epochs=3")
    assert (linear.trained, linear.forward, linear.parameters) == (0, 31_000 * flops, 0)
    tuned = work("semisup_100", "epochs=3")
    assert (tuned.trained, tuned.forward, tuned.kind) == (30_000 * flops, 1_000 * flops, "finetune")
    assert not tuned.half
    assert work("semisup_100", "precision=bf16").half
    voc, coco = work("detect_voc"), work("detect_coco")
    assert voc.steps == 24_000
    assert coco.trained > voc.trained > 24_000 * 16 * 5 * flops  # larger images, and 512 regions of each
    assert work("segment_voc").trained > work("segment_voc", "output_stride=16").trained > 0


@given(st.floats(1e12, 1e18), st.floats(0, 1e9), st.integers(0, 10**6), st.integers(1, 64), st.floats(0.5, 64))
def test_more_gpus_or_cores_never_take_longer_without_exchange(
    operations: float, loaded: float, steps: int, gpus: int, cores: float
) -> None:
    work = Workload(trained=operations, loaded=loaded, views=2, steps=steps)
    one, more = cost(work, SPEED, 1, cores), cost(work, SPEED, gpus, cores)
    assert more.seconds <= one.seconds * (1 + 1e-9)
    assert one.gpu_hours == pytest.approx(one.seconds / 3600)
    assert cost(work, SPEED, 1, 2 * cores).seconds <= one.seconds
    exchanged = cost(replace(work, parameters=25_000_000), SPEED, gpus, cores)
    assert exchanged.seconds >= more.seconds


def test_what_bounds_a_run() -> None:
    work = Workload(trained=1e15 / 3, loaded=1_000_000, views=2, steps=10, parameters=1000)
    slow = cost(work, SPEED, 1, 1)
    assert (slow.bound, slow.seconds) == ("loader cores", 10_000)  # 100 images/s of the one core
    assert slow.cores == pytest.approx(10)  # in the 1000 s of arithmetic
    assert cost(work, SPEED, 1, 100).bound == "arithmetic"
    many = replace(work, loaded=0, parameters=10**9, steps=10**5)
    assert cost(many, SPEED, 64, 1).bound == "exchange"
    assert model.exchange_seconds(1e9, 1) == 0
    assert model.exchange_seconds(1e9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / 200e9)
    assert cost(work, SPEED, 1, 100, 1000.0).bytes_per_second == pytest.approx(1e6)


def job(name: str, gpus: int, parent: str | None = None) -> tuple[CellWork, int]:
    cell = Cell("transfer", name, name, Path(name), Resources(gpus_per_node=gpus), "knn", "x", 0, parent=parent)
    return CellWork(cell, Workload(), 0.0), gpus


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 20), st.floats(1, 100)), min_size=1, max_size=12))
def test_the_schedule_of_a_suite_is_between_its_bounds(drawn: list[tuple[int, int, float]]) -> None:
    jobs, costs, depth = [], {}, {}
    for number, (gpus, parent, seconds) in enumerate(drawn):
        of = f"transfer/{parent}" if parent < number else None
        one, _ = job(str(number), gpus, of)
        jobs.append(one)
        costs[one.cell.id] = Cost(gpus, seconds, 0, 0, 0, 0, 0)
        depth[one.cell.id] = seconds + (depth[of] if of is not None else 0.0)
    wall = wall_seconds(jobs, costs, 8)
    assert wall >= max(depth.values()) - 1e-6  # the longest chain
    assert wall >= sum(one.gpus * one.seconds for one in costs.values()) / 8 - 1e-6  # all GPUs busy all the time
    assert wall <= sum(one.seconds for one in costs.values()) + 1e-6  # one after another


def bench_file(folder: Path) -> Path:
    rows = {
        "arithmetic": [
            {"name": "matrices", "value": 1, "share": None, "more": {}},
            {"name": "small", "value": 1, "share": None, "more": {"crop": 32, "half": 0.0, "flop_per_s": 2e12}},
            {"name": "large", "value": 1, "share": None, "more": {"crop": 224, "half": 0.0, "flop_per_s": 5e12}},
            {"name": "half", "value": 1, "share": None, "more": {"crop": 224, "half": 1.0, "flop_per_s": 9e12}},
        ],
        "pretraining": [
            {"name": "CIFAR ResNet-18, 32 pixels: moco", "share": 0.5, "more": {"crop": 32}},
            {"name": "ResNet-50, 224 pixels: moco + mixmask", "share": 0.8, "more": {"crop": 224}},
        ],
        "loader": [{"name": "1 core", "more": {"per_core": 500.0}}],
    }
    file = folder / "bench.json"
    file.write_text(json.dumps({"format": 1, "machine": "a machine", "rows": rows}))
    return file


def test_measured_speeds(tmp_path: Path) -> None:
    speed = measured(bench_file(tmp_path))
    assert (speed.name, speed.per_core, speed.measured) == ("a machine", 500.0, True)
    small = Workload(forward=1e12, side=32, kind="moco")
    assert speed.seconds(small) == pytest.approx(1 / (2 * 0.5))
    assert speed.seconds(replace(small, side=224, mixture="mixmask")) == pytest.approx(1 / (5 * 0.8))
    assert speed.seconds(replace(small, side=224, kind="byol")) == pytest.approx(
        1 / (5 * 0.8)
    )  # the median of what there is
    assert speed.seconds(replace(small, side=224, kind="frozen")) == pytest.approx(1 / 5)
    assert speed.seconds(replace(small, side=224, kind="frozen", half=True)) == pytest.approx(1 / 9)
    assert speed.seconds(replace(small, half=True)) == speed.seconds(small)  # not measured in that format


def test_assumed_speeds() -> None:
    assert assumed("A100").name == assumed("a-100").name == "a100"
    assert assumed("h100").rates[224, True] == PEAKS["h100"][0] * 1e12 * speeds.ASSUMED_EFFICIENCY
    assert assumed("v100").rates[224, False] == 15.7e12 * speeds.EFFICIENCY_WITHOUT
    assert all(half > single for half, single in PEAKS.values())
    assert "assumed, not measured" in assumed("h100").source


BENCH = (
    '{{"format": 1, "machine": "x", "rows": {{"arithmetic": [{{"more": {{"crop": 32, "half": 1, "flop_per_s": {rate}}}}}], '
    '"pretraining": [{{"name": "x: moco", "share": {share}, "more": {{"crop": 32}}}}], '
    '"loader": [{{"more": {{"per_core": {core}}}}}]}}}}'
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "is not a bench.json"),
        ("[]", "is not a bench.json"),
        ('{"format": 2, "rows": {}}', "is of format 2; this version reads format 1"),
        ('{"format": 1, "machine": "x", "rows": {}}', "lacks the part 'arithmetic'"),
        (BENCH.format(rate=0, share=0.5, core=1), "not above 0"),
        (BENCH.format(rate=1, share=0, core=1), "not above 0"),
        (BENCH.format(rate=1, share=0.5, core=0), "not above 0"),
        (BENCH.format(rate="NaN", share=0.5, core=1), "not above 0"),
        ('{"format": 1, "machine": "x", "rows": {"arithmetic": [{"more": 3}]}}', "is not a bench.json"),
    ],
)
def test_files_that_are_no_benchmark(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        measured(file)


@pytest.mark.slow
def test_the_share_of_labels_counts_where_the_data_are_not_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], resnet50: Path
) -> None:
    suite = tmp_path / "labels.yaml"
    grid = {
        "checkpoints": [{"name": "one", "path": str(resnet50)}],
        "transfer": [{"config": "semisup_1"}, {"config": "semisup_10"}, {"config": "svm_voc07"}],
    }
    suite.write_text(yaml.safe_dump({"name": "labels", "grids": [grid]}))
    jobs, notes = jobs_of(expand(load_suite(suite), tmp_path, Profile(), tmp_path / "runs"))
    work = {one.cell.protocol: one.work for one in jobs}
    assert 9 < work["semisup_10"].trained / work["semisup_1"].trained < 11
    assert work["svm_voc07"].loaded == 5_011 + 4_952
    assert len(notes) == 2
    speed = speed_of(Profile())
    assert "no GPU is named" in capfd.readouterr().err
    text = describe("labels", list(expand(load_suite(suite), tmp_path, Profile(), tmp_path / "runs")), speed, None)
    assert "1 loader cores beside each GPU" in text
    assert "3 runs are in fp32; with precision=bf16 they take" in text
    with pytest.raises(ConfigError, match="--gpu and --bench: give one"):
        speed_of(Profile(), "a100", bench_file(tmp_path))
    assert speed_of(Profile.model_validate({"bench": str(bench_file(tmp_path))})).measured
    assert speed_of(Profile.model_validate({"gpu": "a100"})).name == "a100"


def test_a_gpu_that_is_not_known_is_told_which_are() -> None:
    with pytest.raises(ConfigError, match=r"--gpu h1000: .*known: h100, .*mixmask bench"):
        assumed("h1000")


def cells_of(tmp_path: Path, shapes: Path) -> tuple[Cell, ...]:
    suite = write_suite(tmp_path, [{"pretrain": [RANDOM, MIXMASK], "transfer": [KNN]}], shapes)
    return expand(load_suite(suite), suite.parent, Profile(), tmp_path / "runs")


def test_a_suite_on_data_that_are_here(tmp_path: Path, shapes: Path) -> None:
    cells = cells_of(tmp_path, shapes)
    jobs, notes = jobs_of(cells)
    assert not notes
    work = {one.cell.name: one for one in jobs}
    assert work["random"].work.operations == 0
    assert work["mixmask"].work.steps == 2
    assert work["mixmask"].bytes_per_image > 100
    text = describe("small", cells, assumed("a100"), 8)
    assert "4 of 4 cells are left to do, on a100" in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("pretrain", "knn", "all"))] == [
        "pretrain",
        "knn",
        "all",
    ]
    for cell in cells:
        for file in cell.done:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
    assert describe("small", cells, assumed("a100"), 8) == "small: all 4 cells are finished"


def test_data_that_are_not_here_count_with_their_published_size(tmp_path: Path, shapes: Path) -> None:
    cells = cells_of(tmp_path, shapes)
    moved = []
    for cell in cells:
        assert cell.recipe is not None
        data = cell.recipe.data.model_copy(update={"root": str(tmp_path / "nowhere"), "name": "cifar10"})
        moved.append(replace(cell, recipe=cell.recipe.model_copy(update={"data": data})))
    jobs, notes = jobs_of(moved)
    assert notes == ["cifar10: its folder is not there, so its published size is taken (50,000 and 10,000 images)"]
    flops = forward_flops(BackboneRecipe(arch="resnet18"), 32)
    assert next(one.work.operations for one in jobs if one.cell.stage == "transfer") == 60_000 * flops
    assert cells[0].recipe is not None
    data = cells[0].recipe.data.model_copy(update={"root": "nowhere"})
    with pytest.raises(DataError, match="nowhere"):  # nothing is published about these
        jobs_of([replace(cells[0], recipe=cells[0].recipe.model_copy(update={"data": data}))])
