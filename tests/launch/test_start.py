"""How `mixmask launch` starts: what it imports, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.slurm import Slurm
from tests.launch.small import KNN, MIXMASK, profile, wait_until_over, write_suite

# Imports that take seconds or hundreds of megabytes, with the place in our code where each comes from.
SCRIPT = """
import importlib.abc, json, sys, traceback

HEAVY = ("torch", "torchvision", "timm", "pandas", "scipy", "sklearn", "matplotlib", "pyarrow", "transformers")
found = {}

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in HEAVY and name not in found:
            stack = traceback.extract_stack()
            ours = [f"{one.filename}:{one.lineno}: {one.line}" for one in stack if "mixmask/" in one.filename]
            found[name] = ours[-1] if ours else "?"

sys.meta_path.insert(0, Watch())
sys.argv = json.loads(sys.argv[1])
from mixmask.launch.commands.app import main
try:
    main()
finally:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(json.dumps([found, int(status["VmHWM"].split()[0]) // 1024]), file=sys.stderr)
"""


def started(*command: object) -> tuple[dict[str, str], int, str]:
    """What a command imported of the heavy libraries, its peak memory in MiB, and its output."""
    arguments = json.dumps(["mixmask", *map(str, command)])
    done = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, check=True)
    found, peak = json.loads(done.stderr.splitlines()[-1])
    return found, peak, done.stdout


@pytest.mark.parametrize(
    "transfer",
    [
        "{config: knn_photos, set: {data.name: shapes}}",
        "{config: linear_grid, set: {data.name: shapes, batch_size: 8}}",
        "{config: semisup_100, set: {data.name: shapes, labels: 50, batch_size: 8, lr_trunk: 0.01, lr_head: 0.1}}",
        "{config: logreg, set: {data.name: shapes, data.test: val}}",
    ],
)
def test_a_dry_run_needs_no_torch(transfer: str, shapes: Path, tmp_path: Path) -> None:
    suite = tmp_path / "two.yaml"
    suite.write_text(
        f"""
name: two
data: {{shapes: {json.dumps(str(shapes))}}}
grids:
  - pretrain:
      - config: imagenet_mocov2_mixmask
        set: {{data.name: shapes, batch_size: 8, framework.queue_size: 64, framework.bn_splits: 1, mix.mask_groups: 1}}
    transfer:
      - {transfer}
"""
    )
    found, peak, said = started("launch", suite, "--profile", "cpu", "--dry-run", "--runs", tmp_path / "runs")
    assert found == {}
    assert peak < 300
    assert "2 cells" in said
    assert "GPU-hours" in said


@pytest.mark.parametrize("command", [("configs",), ("zoo",), ("pretrain", "--help")])
def test_commands_that_only_read_need_no_torch(command: tuple[str, ...]) -> None:
    found, peak, said = started(*command)
    assert (found, bool(said)) == ({}, True)
    assert peak < 300


@pytest.mark.slow
def test_a_launch_on_slurm_needs_no_torch(slurm: Slurm, shapes: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path, [{"pretrain": [MIXMASK], "transfer": [KNN]}], shapes)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump(profile().model_dump(mode="json", exclude_unset=True)))
    found, peak, _ = started("launch", suite, "--profile", cluster, "--runs", tmp_path / "runs")
    assert found == {}
    assert peak < 300
    assert {one.state for one in wait_until_over(tmp_path / "runs").values()} == {"done"}
