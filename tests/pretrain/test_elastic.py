"""The same recipe on one, two and four processes: the same images, masks and partners, and the same losses.

Batch statistics are those of the whole batch (``sync_bn``), or for MoCo and DenseCL those of four groups.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmask.engine.backbones import load_backbone
from tests.pretrain.small_runs import CONFIG, SMALL_FRAMEWORKS
from tests.processes import python

WORLDS = (1, 2, 4)
pytestmark = pytest.mark.xdist_group("elastic")  # one process makes the runs for all tests

# Small learning rates: a chaotic run would blow rounding up, and what is compared is the computation.
COMMON = ["max_steps=2", "optimizer.lr=0.001", "backbone.arch=timm/test_resnet", "data.num_workers=0"]
WHOLE = [*COMMON, "sync_bn=true"]
MOCO = "framework={kind: mocov2, dim: 16, queue_size: 64, momentum: 0.9, bn_splits: 4}"
SIMSIAM = "framework={kind: simsiam, dim: 16, projector_layers: 2}"
RUNS = {
    **{name: [*WHOLE, value] for name, value in SMALL_FRAMEWORKS.items() if name not in ("moco", "densecl")},
    "moco": [*COMMON, MOCO],
    "densecl": [*COMMON, MOCO.replace("mocov2", "densecl")],
    "resident": [*COMMON, MOCO, "data.storage=resident", "mix={kind: mixmask+unmix, grid: 4, mask_groups: 4}"],
    "erased": [*COMMON, MOCO, "mix={kind: erase, grid: 4, fill: noise, extra_crops: 1, extra_crop: 16}"],
    "blended": [*COMMON, MOCO, "mix={kind: unmix, mask_groups: 2}"],
    "accumulated": [*WHOLE, SIMSIAM, "accumulate=2"],
}

ON_FOUR = ("byol", "swav", "moco", "resident")  # four processes on two cores are slow

# Runs every job, and writes which pixels each row of the global batch had: cropped, augmented and mixed.
SCRIPT = """
import json, sys, torch
from pathlib import Path
from mixmask.engine import distributed
from mixmask.engine.loader import Batch
from mixmask.pretrain import stage, step
from tests.pretrain.small_runs import plan

torch.set_num_threads(1)
part_of, prepare_of, terms_of = Batch.part, step.prepare, step.terms_of
present, pixels = [], {}

def part(batch, number, parts):
    present[:] = [part_of(batch, number, parts)]
    return present[0]

def note(what, images):
    for row, values in zip(present[0].rows, images.double().sum((2, 3)).tolist(), strict=True):
        pixels.setdefault(f"{present[0].step} {row}", []).append([what, values])

def prepare(framework, mix, views, *others):
    for cut, view in zip(present[0].views, views):
        note("cut", cut)
        note("view", view)
    return prepare_of(framework, mix, views, *others)

def terms(framework, *others):
    query = framework.query
    framework.query = lambda images: (note("mixed", images), query(images))[1]
    yield from terms_of(framework, *others)
    del framework.query

Batch.part, step.prepare, step.terms_of = part, prepare, terms
config, out, jobs = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
with distributed.session() as world:
    for name, overrides in jobs.items():
        pixels.clear()
        stage.run(plan(config, out / str(world.size), f"name={name}", *overrides))
        (out / f"{name}-{world.size}-{world.rank}.json").write_text(json.dumps(pixels))
"""


def run_of(out: Path, world: int, name: str) -> Path:
    (found,) = (out / str(world) / "pretrain").glob(f"{name}-*")
    return found


def worlds_of(name: str) -> tuple[int, ...]:
    return WORLDS if name in ON_FOUR else WORLDS[:2]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def everywhere(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job with every world size; a process group runs them all."""
    out = tmp_path_factory.mktemp("elastic")
    config, script = out / "tiny.yaml", out / "elastic.py"
    config.write_text(CONFIG.replace("ROOT", str(shapes)))
    script.write_text(SCRIPT)
    for world in WORLDS:
        jobs = {name: RUNS[name] for name in (ON_FOUR if world == 4 else RUNS)}
        done = python(world, script, str(config), str(out), json.dumps(jobs))
        assert [code for code, _, _ in done] == [0] * world, done
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_loss_curve_does_not_depend_on_the_number_of_processes(everywhere: Path, name: str) -> None:
    one, *others = (run_of(everywhere, world, name) for world in worlds_of(name))
    assert len(losses(one)) == 2
    ours = load_backbone(one / "backbone.safetensors")[0]
    for other in others:
        assert other.name == one.name  # one fingerprint
        assert losses(other) == pytest.approx(losses(one), rel=1e-4)  # fp32, sums in another order
        theirs = load_backbone(other / "backbone.safetensors")[0]
        for key, value in ours.items():
            assert torch.allclose(theirs[key], value, rtol=1e-3, atol=1e-4), key  # running statistics, too


RESUMED = """
import sys, torch
from pathlib import Path
from mixmask.engine import distributed
from mixmask.pretrain import stage
from tests.pretrain.small_runs import interrupt_at, plan

torch.set_num_threads(1)
config, out, stop = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with distributed.session():
    one = plan(config, out, *sys.argv[4:])
    interrupt_at(stop, one) if stop else stage.run(one)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "first", "second"), [("byol", 2, 4), ("swav", 2, 1), ("moco", 4, 1)])
def test_a_run_goes_on_with_another_number_of_processes(
    everywhere: Path, tmp_path: Path, name: str, first: int, second: int
) -> None:
    """One step on some processes and one on others: the losses of two steps on one."""
    script = tmp_path / "resumed.py"
    script.write_text(RESUMED)
    told = ""
    for world, stop in ((first, 1), (second, 0)):
        arguments = [str(everywhere / "tiny.yaml"), str(tmp_path), str(stop), f"name={name}", *RUNS[name]]
        done = python(world, script, *arguments, "checkpoint_every=1")
        assert [code for code, _, _ in done] == [0] * world, done
        told += done[0][2]
    assert "resuming at step 1 of 2" in told
    assert "warning" not in told.lower()
    (run,) = (tmp_path / "pretrain").iterdir()
    whole = run_of(everywhere, 1, name)
    assert run.name == whole.name
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_row_has_the_same_pixels_wherever_it_is(everywhere: Path, name: str) -> None:
    def rows(world: int) -> dict[str, Any]:
        parts = [json.loads((everywhere / f"{name}-{world}-{rank}.json").read_text()) for rank in range(world)]
        assert sum(map(len, parts)) == 2 * 16  # each row on one process
        return {key: value for part in parts for key, value in part.items()}

    one = rows(1)
    kinds = {kind for values in one.values() for kind, _ in values}
    assert kinds == {"cut", "view", "mixed"}
    assert all(rows(world) == one for world in worlds_of(name))
