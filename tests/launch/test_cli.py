from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import zygote
from tests.conftest import make_backbone

pytestmark = pytest.mark.xdist_group("zygote")  # one worker: each would start a zygote of its own
CONFIGS = Path(__file__).parents[2] / "configs"


def mixmask(*arguments: object) -> subprocess.CompletedProcess[str]:
    return zygote.run(["-m", "mixmask", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """Run a command that must end as a user's mistake: exit code 2, one message, no traceback."""
    done = mixmask(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("command", ["pretrain", "convert", "inspect", "transfer", "tables", "demo", "doctor"])
def test_help_has_an_example(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mixmask", command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert f"mixmask {command}" in done.stdout.split("Example")[1]


def test_help_does_not_load_torch() -> None:
    code = "import sys, mixmask.launch.commands.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_mistakes_end_with_one_message_and_exit_code_2(shapes: Path, tmp_path: Path) -> None:
    config = CONFIGS / "demo" / "pretrain.yaml"
    good = [f"data.root={shapes}", "--runs", tmp_path / "runs"]
    assert "no such config file" in refused("pretrain", tmp_path / "absent.yaml")
    assert "Did you mean 'epochs'?" in refused("pretrain", config, "epoch=3", *good)
    assert "no such data folder" in refused("pretrain", config, f"data.root={tmp_path / 'x'}")
    assert "larger than the data set of 120" in refused(
        "pretrain", config, "batch_size=128", "framework.queue_size=128", "augment.crop=32", *good
    )
    assert "no such checkpoint file" in refused("convert", tmp_path / "x.pth", tmp_path / "y.pkl", "--to", "detectron2")
    assert "no such folder of runs" in refused("tables", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no finished run" in refused("tables", tmp_path / "empty")
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_recipe_and_writes_nothing(shapes: Path, tmp_path: Path) -> None:
    done = mixmask(
        "pretrain",
        CONFIGS / "demo" / "pretrain.yaml",
        f"data.root={shapes}",
        "epochs=2",
        "--runs",
        tmp_path / "runs",
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    assert "epochs: 2" in done.stdout
    assert "2 epochs × 1 steps of 64" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_convert_prints_the_account(tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "backbone.safetensors")
    done = mixmask("convert", backbone, tmp_path / "out.pkl", "--to", "detectron2")
    assert done.returncode == 0, done.stderr
    assert "100 tensors, and 20 batch counters" in done.stdout
    assert (tmp_path / "out.pkl").is_file()
    before = backbone.read_bytes()
    assert "another file" in refused("convert", backbone, backbone, "--to", "timm")
    assert backbone.read_bytes() == before


@pytest.mark.slow
def test_a_failed_run_is_exit_code_1(shapes: Path, tmp_path: Path) -> None:
    done = mixmask(
        "pretrain",
        CONFIGS / "demo" / "pretrain.yaml",
        f"data.root={shapes}",
        "backbone.arch=resnet18",
        "optimizer.lr=1e30",
        "warmup_epochs=0",
        "monitor=null",
        "--runs",
        tmp_path / "runs",
    )
    assert done.returncode == 1, done.stderr
    assert "the loss is not finite" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_transfer_then_tables(shapes: Path, tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "backbone.safetensors")
    runs = tmp_path / "runs"
    done = mixmask(
        "transfer", CONFIGS / "demo" / "knn.yaml", f"backbone={backbone}", f"data.root={shapes}", "evaluation.crop=32",
        "--runs", runs,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("knn/top1 ")
    out = tmp_path / "table.csv"
    assert mixmask("tables", runs, "--format", "csv", "--out", out).returncode == 0
    lines = out.read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("methods,shapes / MoCo v2 / MixMask / resnet18 / 1,demo-shapes / kNN top-1,")
    assert "is a folder" in refused("tables", runs, "--out", tmp_path)


def test_doctor_names_what_is_missing_and_how_to_get_it() -> None:
    done = mixmask("doctor")
    assert done.returncode == 0, done.stderr
    assert "engine torchvision: ready" in done.stdout
    assert "torch " in done.stdout
    assert "engine detectron2: ready" in done.stdout or "To install it: pip install --no-build-isolation" in done.stdout


def test_demo_dry_run_lists_every_stage(tmp_path: Path) -> None:
    done = mixmask("demo", "--out", tmp_path / "demo", "--dry-run")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stderr.splitlines() if line.startswith("$ mixmask")]
    assert len([c for c in commands if " pretrain " in c]) == 3
    assert len([c for c in commands if " convert " in c]) == 4
    assert len([c for c in commands if " transfer " in c]) == 3 * 5 + 2 * 2
    assert not (tmp_path / "demo").exists()
