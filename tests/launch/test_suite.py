"""From a suite's file to cells, and what is refused."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixmask.engine.backbones import BackboneInfo
from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.errors import CheckpointError, ConfigError, DataError
from mixmask.launch.slurm.profile import Profile, Resources, load_profile
from mixmask.launch.suite import cells as cells_module
from mixmask.launch.suite.cells import Cell, check_cells, expand
from mixmask.launch.suite.suite import load_suite
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.transfer.checkpoints.source import Source, read_source
from mixmask.transfer.checkpoints.tensor_report import TensorReport
from mixmask.transfer.protocol import TransferRecipe
from mixmask.transfer.protocols.linear import LinearRecipe
from mixmask.transfer.zoo.catalogue import known_checkpoint
from mixmask.transfer.zoo.references import Located
from tests.launch.small import KNN, MIXMASK, write_suite

SUITES = sorted((configs_folder() / "suites").glob("*.yaml"))

# cells (pretraining, conversions, transfers) of every suite, counted by hand from the paper's tables
COUNTS = {
    "demo": (3, 3, 6),
    "figure5": (30, 0, 30),
    "frozen": (0, 0, 15),
    "semisup": (3, 0, 9),
    "table1": (28, 0, 28),
    "known": (0, 0, 210),
    "table2": (12, 0, 12),
    "table3": (3, 0, 3),
    "table4": (6, 0, 6),
    "table5": (28, 0, 28),
    "table7": (3, 3, 18),
}


def cells_of(path: Path, *overrides: str, profile: Profile | None = None) -> tuple[Cell, ...]:
    return expand(load_suite(path, overrides), path.parent, profile or Profile(), path.parent / "runs")


def pretend_checkpoints(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Every checkpoint of the zoo is in a folder, and is another ResNet-50 each; no file is written or read."""

    def located(reference: str, download: bool) -> Located:
        assert not download
        entry = known_checkpoint(reference.removeprefix("zoo:"))
        assert not entry.by_hand  # a suite that nobody can start is no use
        return Located(folder / entry.name / entry.file_name, entry)

    def read(path: Path, reading: object) -> Source:
        digest = f"{zlib.crc32(str(path).encode()):08x}"
        info = BackboneInfo(
            arch="resnet50", stem="standard", in_channels=3, framework="unknown", method="unknown", fingerprint=digest,
            lineage=digest,
        )  # fmt: skip
        return Source(path, {}, info, TensorReport("pretended", {}, {}))

    monkeypatch.setattr(cells_module, "locate_checkpoint", located)
    monkeypatch.setattr(cells_module, "read_source", read)


@pytest.mark.slow
def test_known_checkpoints_expect_what_their_publishers_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_checkpoints(monkeypatch, tmp_path)
    cells = expand(load_suite(configs_folder() / "suites" / "known.yaml"), tmp_path, Profile(), tmp_path / "runs")
    recipes = {cell.name: cell.recipe for cell in cells if isinstance(cell.recipe, TransferRecipe)}
    assert {one.value for one in recipes["swav-800ep-imagenet-linear-swav"].expected} == {75.3}
    found = {name.split("-imagenet")[0].split("-voc")[0] for name, recipe in recipes.items() if recipe.expected}
    assert {
        "mocov2-800ep",
        "mocov2-200ep",
        "mocov1-200ep",
        "swav-800ep",
        "barlowtwins-1000ep",
        "vicreg",
        "dino",
    } <= found
    assert all(recipe.framework not in (None, "unknown") for recipe in recipes.values())
    assert all(recipe.backbone.startswith("zoo:") for recipe in recipes.values())


@pytest.mark.slow
@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_that_come_with_the_project(
    path: Path, tmp_path: Path, resnet18: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem == "known":
        pretend_checkpoints(monkeypatch, tmp_path)
    suite = load_suite(path, [f"checkpoints=[{{path: {resnet18}, name: mine}}]"] if path.stem == "frozen" else [])
    assert suite.name == path.stem
    cells = expand(suite, path.parent, load_profile(configs_folder() / "cluster" / "example.yaml"), tmp_path)
    stages = [cell.stage for cell in cells]
    assert tuple(stages.count(stage) for stage in ("pretrain", "convert", "transfer")) == COUNTS[path.stem]
    assert len({cell.name for cell in cells if cell.stage == "pretrain"}) == COUNTS[path.stem][0]


def test_the_ablations_of_table_1_are_the_papers() -> None:
    path = configs_folder() / "suites" / "table1.yaml"
    cells = [
        cell for cell in cells_of(path) if isinstance(cell.recipe, PretrainRecipe) and cell.dataset == "imagenet1k"
    ]
    found = {
        (mix["grid"], mix["mask"], str(mix["ratio"]), mix["switch"])
        for cell in cells
        if (mix := cell.recipe.model_dump(mode="json")["mix"] if cell.recipe is not None else None)
    }
    assert found == {
        *((grid, "block", "0.5", True) for grid in (2, 4, 8, 16, 32, 48)),
        (8, "discrete", "0.5", True),
        *((8, "block", ratio, True) for ratio in ("0.25", "[0.0, 1.0]", "[0.25, 0.75]")),
        (8, "block", "0.5", False),
    }


def test_names_seeds_data_and_resources(tmp_path: Path, shapes: Path) -> None:
    vary = {**MIXMASK, "vary": {"mix.grid": [2, 4], "mix.ratio": [0.5, [0.25, 0.75]]}, "seeds": [3, 7]}
    big = {"demo": "linear", "name": "probe", "resources": {"time_min": 5}, "seeds": [0, 1]}
    path = write_suite(tmp_path, [{"pretrain": [vary], "transfer": [big]}], shapes)
    profile = Profile(resources=Resources(cpus_per_task=6, time_min=90), data={"demo-shapes": "/not/taken"})
    cells = cells_of(path, profile=profile)
    assert [cell.stage for cell in cells] == ["pretrain"] * 8 + ["transfer"] * 16
    first, last = cells[0], cells[-1]
    assert (first.name, first.seed) == ("mixmask_grid-2_ratio-0.5_seed-3", 3)
    assert cells[7].name == "mixmask_grid-4_ratio-0.25-0.75_seed-7"
    assert last.name == "mixmask_grid-4_ratio-0.25-0.75_seed-7-probe_seed-1"
    assert last.parent == cells[7].id
    assert isinstance(first.recipe, PretrainRecipe)
    assert isinstance(last.recipe, LinearRecipe)
    assert first.recipe.data.root == last.recipe.data.root == str(shapes)  # the suite's before the profile's
    assert last.recipe.backbone == str(cells[7].run.resolve() / "backbone.safetensors")
    assert (first.resources.minutes, first.resources.cpus_per_task) == (90, 6)
    assert (last.resources.minutes, last.resources.cpus_per_task) == (5, 6)
    assert first.run.name == f"{first.name}-{first.fingerprint}"


def test_the_monitors_own_data_have_their_place_from_the_suite(tmp_path: Path, shapes: Path) -> None:
    own = {**MIXMASK, "set": {"monitor": {"every_epochs": 1, "data": {"name": "demo-shapes", "root": "not/here"}}}}
    (cell,) = cells_of(write_suite(tmp_path, [{"pretrain": [own]}], shapes))
    assert isinstance(cell.recipe, PretrainRecipe)
    assert cell.recipe.monitor is not None
    assert cell.recipe.monitor.data is not None
    assert cell.recipe.monitor.data.root == str(shapes)


def test_seeds_that_change_nothing_are_warned_of(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells_of(write_suite(tmp_path, [{"pretrain": [MIXMASK], "transfer": [{**KNN, "seeds": [0, 1]}]}], shapes))
    assert "knn.yaml: the seed does not change its result" in capsys.readouterr().err


def test_the_command_line_comes_last(tmp_path: Path, shapes: Path) -> None:
    own = {**MIXMASK, "set": {"max_steps": 5}}
    path = write_suite(tmp_path, [{"pretrain": [own]}], shapes)

    def steps(*overrides: str) -> object:
        recipe = cells_of(path, *overrides)[0].recipe
        assert isinstance(recipe, PretrainRecipe)
        return recipe.max_steps

    assert steps() == 5  # the suite's 2 is for those that say nothing
    assert steps("set.pretrain.max_steps=9") == 9


def test_a_checkpoint_needs_no_pretraining(tmp_path: Path, shapes: Path, resnet18: Path) -> None:
    grid = {"checkpoints": [{"path": str(resnet18), "name": "theirs"}], "transfer": [KNN], "convert": {"to": ["timm"]}}
    convert, knn = cells_of(write_suite(tmp_path, [grid], shapes))
    assert knn.parent is convert.parent is None
    assert knn.name == "theirs-knn"
    assert convert.source == resnet18.resolve()
    assert convert.fingerprint != knn.fingerprint
    assert read_source(resnet18).info.fingerprint not in (convert.fingerprint, knn.fingerprint)
    missing = {**grid, "checkpoints": [{"path": "nowhere.pth", "name": "x"}]}
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        cells_of(write_suite(tmp_path, [missing], shapes))


def test_a_run_under_another_name_is_the_same_work(tmp_path: Path, shapes: Path) -> None:
    path = write_suite(tmp_path, [{"pretrain": [MIXMASK]}], shapes)
    before = cells_of(path)[0]
    (tmp_path / "runs" / "pretrain" / f"by-hand-{before.fingerprint}").mkdir(parents=True)
    assert cells_of(path)[0].run.name == f"by-hand-{before.fingerprint}"


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([], r"grids"),
        ([{"transfer": [KNN]}], r"small\.yaml: grids\.0: an empty grid: it needs pretrain recipes or checkpoints"),
        ([{"pretrain": [{**MIXMASK, "seeds": []}]}], r"grids\.0\.pretrain\.0\.seeds"),
        ([{"pretrain": [{**MIXMASK, "vary": {"mix.grid": []}}]}], r"vary\.mix\.grid is empty"),
        (
            [{"pretrain": [MIXMASK, {**MIXMASK, "name": "again"}]}],
            r"(?s)contains duplicate cells.*pretrain: mixmask and again, seed 0",
        ),
        ([{"pretrain": [{**MIXMASK, "seed": 3}]}], r"unknown key 'grids\.0\.pretrain\.0\.seed'.*Did you mean 'seeds'"),
        ([{"pretrain": [{**MIXMASK, "set": {"seed": 3}}]}], r"seed is the suite's to set: use seeds"),
        ([{"pretrain": [{**MIXMASK, "set": {"mix.gird": 3}}]}], r"unknown key 'mix\.gird'.*'grid'"),
        ([{"pretrain": [{**MIXMASK, "resources": {"gpus": 3}}]}], r"unknown key '.*resources\.gpus'.*gpus_per_node"),
        (
            [{"pretrain": [{**MIXMASK, "set": {"backbone.stem": "cifar"}}], "convert": {"to": ["torchvision"]}}],
            r"convert: mixmask: has the CIFAR stem .* leave the conversion out",
        ),
        ([{"pretrain": [{**MIXMASK, "config": "nowhere.yaml"}]}], r"nowhere\.yaml: no such config file"),
    ],
)
def test_what_is_refused(grids: list[dict[str, Any]], message: str, tmp_path: Path, shapes: Path) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        cells_of(write_suite(tmp_path, grids, shapes))


def test_a_circle_of_bases_and_an_unknown_data_set_are_refused(tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_suite(tmp_path / "a.yaml")
    path = write_suite(tmp_path, [{"pretrain": [MIXMASK]}], shapes)
    with pytest.raises(ConfigError, match=r"has the data set cifar1000; there are: demo-shapes"):
        cells_of(path, "data.cifar1000=/x")


def test_data_and_sizes_are_checked_before_anything_is_submitted(tmp_path: Path, shapes: Path) -> None:
    path = write_suite(tmp_path, [{"pretrain": [MIXMASK], "transfer": [KNN]}], shapes)
    check_cells(cells_of(path))
    with pytest.raises(DataError, match="no such data folder"):
        check_cells(cells_of(path, "data.demo-shapes=/nowhere"))
    with pytest.raises(ConfigError, match=r"pretrain/mixmask-.*cannot be shared equally by 3 processes"):
        check_cells(cells_of(path, "resources.pretrain.tasks_per_node=3"))
    with pytest.raises(ConfigError, match=r"transfer/mixmask-knn.*k 500 is larger"):
        check_cells(cells_of(path, "set.knn.k=500"))


def test_a_machine_without_detectron2_can_submit_to_one_that_has_it(
    tmp_path: Path, shapes: Path, voc: Path, resnet18: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    checkpoint = {"path": str(resnet18), "name": "theirs"}
    grid = {"checkpoints": [checkpoint], "transfer": [{"demo": "detect_voc", "set": {"engine": "detectron2"}}]}
    check_cells(cells_of(write_suite(tmp_path, [grid], shapes, data={"demo-voc": str(voc)})))


def test_profiles(tmp_path: Path) -> None:
    for path in sorted((configs_folder() / "cluster").glob("*.yaml")):
        assert load_profile(path).resources.num_nodes == 1
    every_key = set(yaml.safe_load((configs_folder() / "cluster" / "example.yaml").read_text()))
    assert every_key == set(Profile.model_fields)
    (tmp_path / "p.yaml").write_text("partition: gpu\npartitions: [a]\n")
    with pytest.raises(ConfigError, match=r"unknown key 'partitions'.*Did you mean 'partition'"):
        load_profile(tmp_path / "p.yaml")


def test_a_job_has_a_task_per_gpu_and_detectron2_one_per_node(tmp_path: Path) -> None:
    path = configs_folder() / "suites" / "table7.yaml"
    profile = load_profile(configs_folder() / "cluster" / "example.yaml")
    suite = load_suite(path, ["set.detect_voc.engine=detectron2"])
    cells = {cell.protocol: cell for cell in expand(suite, path.parent, profile, tmp_path)}
    coco = profile.sbatch_parameters(cells["detect_coco"].resources, tmp_path, "aftercorr:3")
    assert (coco["ntasks_per_node"], coco["gpus_per_node"], coco["cpus_per_task"]) == (8, 8, 8)
    voc = profile.sbatch_parameters(cells["detect_voc"].resources, tmp_path, None)
    assert (voc["ntasks_per_node"], voc["gpus_per_node"], voc["cpus_per_task"]) == (1, 8, 64)
    assert voc["additional_parameters"]["mail-type"] == "FAIL"
    assert voc["partition"] == "gpu"
    assert voc["mem"] == f"{400 * 1024}MB"
    assert "dependency" not in voc
    assert coco["dependency"] == "aftercorr:3"
    assert profile.command("x") == "apptainer exec --nv /shared/images/torch.sif /shared/envs/mixmask/bin/python"


def test_a_config_of_the_project_is_found_by_its_name(tmp_path: Path) -> None:
    tree = {"name": "named", "grids": [{"pretrain": [{"config": "imagenet_mocov2"}], "transfer": [{"config": "knn"}]}]}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert [cell.protocol for cell in cells_of(path)] == ["pretrain", "knn"]
    path.write_text(yaml.safe_dump(tree).replace("imagenet_mocov2", "imagenet_mocov"))
    with pytest.raises(ConfigError, match=r"Did you mean .*'imagenet_mocov2'"):
        cells_of(path)


def test_one_mistake_in_a_list_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    entry = {"config": "imagenet_mocov2", "set": {"name": "x"}}
    path.write_text(yaml.safe_dump({"name": "named", "grids": [{"pretrain": [entry]}]}))
    with pytest.raises(ConfigError, match="name is the suite's to set") as error:
        cells_of(path)
    assert len(str(error.value).splitlines()) == 1
