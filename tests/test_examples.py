"""A lab's own package opens every door: pretraining, transfer, a suite, status, tables and the report know what it adds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torchvision.models import resnet18

from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe
from tests.processes import ROOT

PRETRAIN = {
    "name": "ours",
    "data": {"name": "own", "root": "ROOT", "train": "train", "test": "val", "storage": "resident"},
    "backbone": {"arch": "resnet18", "stem": "standard"},
    "framework": {"kind": "align", "dim": 8},
    "mix": {"kind": "halves"},
    "augment": {"crop": 32},
    "optimizer": {"kind": "sgd", "lr": 0.01},
    "epochs": 1,
    "max_steps": 2,
    "batch_size": 8,
    "log_every": 1,
}
FEWSHOT = {
    "protocol": "fewshot",
    "name": "few",
    "backbone": "given by the suite",
    "data": PRETRAIN["data"],
    "evaluation": {"resize": None, "crop": 32},
    "shots": 2,
    "episodes": 3,
}
PROGRAM = """
import sys
from mixmask.launch.commands.app import app
for line in open(sys.argv[1], encoding="utf-8"):
    print("$", line.strip(), flush=True)
    app(line.split(), standalone_mode=False)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example was installed, as it would be into an environment."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run(
        [*command, site, f"{ROOT}/examples/our_lab"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The shapes in one NumPy file, which only the example's kind of data reads."""
    root = tmp_path_factory.mktemp("own")
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        images = open_split(DataRecipe(name="x", root=str(shapes)), part)
        name = "train" if part == "train" else "val"
        arrays[f"{name}_images"] = np.stack([images.read(i).permute(1, 2, 0).numpy() for i in range(len(images))])
        arrays[f"{name}_labels"] = images.labels.numpy()
        arrays["classes"] = np.array(images.classes)
    np.savez(root / "images.npz", **arrays)
    return root


def run(site: Path, folder: Path, *lines: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "commands").write_text("\n".join(lines))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), ROOT]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder / "commands")], cwd=folder, env=env, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == expected, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_a_package_outside_opens_every_door(installed: Path, own_data: Path, tmp_path: Path) -> None:
    for name, tree in (("pretrain", PRETRAIN), ("few", FEWSHOT)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree).replace("ROOT", str(own_data)))
    suite = {
        "name": "ours",
        "set": {"fewshot": {"episodes": 2}},
        "grids": [{"pretrain": [{"config": "pretrain.yaml"}], "transfer": [{"config": "few.yaml"}]}],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    trunk = resnet18().state_dict()
    del trunk["fc.weight"], trunk["fc.bias"]
    theirs = {f"student.convnet.{name}": tensor for name, tensor in trunk.items()}
    torch.save(
        {**theirs, "student.align_head.weight": torch.ones(8, 512), "bank.keys": torch.ones(4, 8)},
        tmp_path / "theirs.pth",
    )
    done = run(
        installed,
        tmp_path,
        "launch suite.yaml --cluster inline --dry-run",
        "show-views pretrain.yaml --out views.png --num 2",
        f"check-data {own_data}",
        "pretrain pretrain.yaml --run-dir alone",
        "transfer few.yaml backbone=alone/backbone.safetensors --runs runs",
        "launch suite.yaml --cluster inline",
        "status ours",
        "tables runs",
        "tables runs --table few_shot_table",
        "inspect theirs.pth",
        "zoo our-align-100ep",
        "tables runs --rows method --cols protocol --metric fewshot/top1",
        "report runs --out report",
        "results runs --format json",
    )
    assert "1 × fewshot_2 on own" in done.stdout
    assert "Halves mask" in done.stdout
    assert "Halves switch" in done.stdout
    assert "120 in 10 classes" in done.stdout
    assert "2 of 2 cells are finished" in done.stdout
    table = done.stdout.split("$ tables runs --table few_shot_table")[1].split("$ ")[0]
    assert "Few-shot accuracy of our lab's methods" in table
    assert "[42.5, " in table  # beside the suite's run, which has as many episodes as the publication states
    assert "Our lab, technical report 1" in " ".join(table.split())
    assert "episodes 3 (this row's recipe: 2)" in table  # the run that was made otherwise
    assert "our-lab: our lab's training code" in done.stdout
    assert "https://our-lab.example/align_100ep.pth" in done.stdout
    assert "[measured by linear]" in done.stdout
    assert "2-shot top-1" in done.stdout
    assert "halves" in done.stdout
    records = [json.loads(file.read_text()) for file in (tmp_path / "runs").rglob("record.json")]
    assert {record["protocol"] for record in records} == {"pretrain", "fewshot_2"}
    assert {record["title"] for record in records} == {"pretraining", "2-shot"}
    assert {record["method"] for record in records} == {"halves"}
    assert all(0 <= record["metrics"].get("fewshot/top1", 0) <= 100 for record in records)
    log = [json.loads(line) for line in (tmp_path / "alone" / "log.jsonl").read_text().splitlines()]
    assert {"clean", "halves"} <= log[0].keys()
    assert "2-shot" in (tmp_path / "report" / "index.html").read_text()


def test_without_the_package_its_names_are_unknown(tmp_path: Path, own_data: Path) -> None:
    from mixmask.engine.errors import ConfigError, DataError
    from mixmask.transfer.recipe import load_transfer_recipe

    (tmp_path / "few.yaml").write_text(yaml.safe_dump(FEWSHOT))
    with pytest.raises(ConfigError, match="there is no protocol 'fewshot'; valid: "):
        load_transfer_recipe(tmp_path / "few.yaml")
    with pytest.raises(DataError, match="no such folder"):
        open_split(DataRecipe(name="own", root=str(own_data)), "train")


@pytest.mark.slow
def test_an_entry_point_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    """As one sentence, with the package that has it, and no traceback."""
    metadata = tmp_path / "site" / "broken_lab-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-lab\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[mixmask.protocols]\nbad = broken_lab.absent\n")
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(FEWSHOT))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), ROOT])}
    command = [sys.executable, "-m", "mixmask", "transfer", str(tmp_path / "few.yaml")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert (
        "entry point 'bad' (broken_lab.absent) in the group mixmask.protocols of broken-lab cannot be loaded"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
