"""The suite of frozen evaluation, on tiny data sets in the layouts of the real ones: one command for all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from mixmask.engine.records import Record
from mixmask.launch.commands.app import app
from mixmask.transfer.features import FILE
from tests.conftest import make_backbone
from tests.engine import benchmark_data

OWN = (
    "food101",
    "sun397",
    "stanford_cars",
    "fgvc_aircraft",
    "dtd",
    "oxford_pets",
    "caltech101",
    "flowers102",
    "cub200",
    "eurosat",
)
SMALL = (
    "set.transfer={evaluation: {resize: 32, crop: 32}, data.num_workers: 0}",
    "set.knn={k: 5, feature_cache: features}",
    "set.logreg={num_c: 3, iterations: 20, feature_cache: features}",
    "set.svm_voc07={low_shot: [1, 2], costs: [0.1, 1], feature_cache: features}",
    "set.few_shot={queries: 1, shots: 2, ways: 2, episodes: 20, feature_cache: features}",
)


@pytest.mark.slow
def test_everything_on_two_checkpoints_with_one_command(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    for kind in OWN:
        getattr(benchmark_data, kind)(data / kind)
    benchmark_data.write_voc2007(data / "voc2007", num=24)
    for name in ("cifar10", "cifar100"):
        (data / name).mkdir()
        (data / name / "train").symlink_to(shapes / "train")
        (data / name / "test").symlink_to(shapes / "val")
    backbones = [make_backbone(tmp_path / f"{arch}.safetensors", arch) for arch in ("resnet18", "resnet34")]
    entries = ", ".join(f"{{path: {path}, name: {path.stem}}}" for path in backbones)
    places = [f"data.{path.name}={path}" for path in data.iterdir()]
    monkeypatch.chdir(tmp_path)
    arguments = ["launch", "frozen", f"checkpoints=[{entries}]", *places, *SMALL, "--cluster", "inline"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "30 of 30 cells are finished" in done.output
    records = [Record.read(path) for path in (tmp_path / "runs" / "transfer").glob("*/record.json")]
    assert len(records) == 30
    assert {record.dataset for record in records} == {*OWN, "voc2007", "cifar10", "cifar100"}
    # Training and test features, once for each backbone and data set.
    features = list((tmp_path / "features").glob(f"*/{FILE}"))
    assert len(features) == 2 * 2 * 13
    assert all(load_file(path)["features"].shape[1] == 512 for path in features)
    table = CliRunner().invoke(app, ["tables", "runs", "--table", "frozen", "--format", "md"]).output.splitlines()
    assert "mean | mean rank | CIFAR-10" in table[2]
    assert all(f"{name}" in table[2] for name in ("Food-101", "VOC 2007", "Flowers-102"))
