"""`mixmask bench`: its parts on this machine, small, and what it writes."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.errors import ConfigError, UserError
from mixmask.launch.bench import benchmark, training_step
from mixmask.launch.bench.machine import Call, Machine, Timing
from mixmask.launch.bench.part import PARTS, LeftOut, Row
from mixmask.launch.bench.parts import arithmetic, frozen, lightly, loader, options, pretraining
from mixmask.launch.bench.parts.options import Options
from mixmask.launch.bench.setups import SETUPS, Setup
from mixmask.launch.bench.training_step import covered
from mixmask.launch.estimate.speeds import measured
from mixmask.pretrain import compiling
from tests.emulated_graph import EmulatedGraph

CPU = torch.device("cpu")
TINY = Setup("tiny, 32 pixels", ("cifar100_",), BackboneRecipe(arch="resnet18", stem="cifar"), 32, ((512, 0),), 8)


def machine(seconds: float = 60.0) -> Machine:
    return Machine(CPU, time.monotonic() + seconds)


def test_every_part_is_found_and_shares_the_time() -> None:
    parts = PARTS.classes()
    assert {"arithmetic", "pretraining", "lightly", "options", "loader", "frozen", "detection"} <= {
        p.name for p in parts
    }
    assert len({part.place for part in parts}) == len(parts)
    assert sum(part.share for part in parts) == pytest.approx(1, abs=0.1)


def test_every_framework_has_a_recipe_of_either_size() -> None:
    small, large = (setup.recipes() for setup in SETUPS)
    assert {"moco", "byol", "simclr", "simsiam", "swav", "dino", "mocov3", "vicreg", "barlowtwins"} <= small.keys()
    assert {"mocov2", "densecl", "byol", "simclr"} <= large.keys()


def test_a_call_is_repeated_within_the_time() -> None:
    timing = machine().time(lambda: time.sleep(0.002), most=5)
    assert timing.repeats == 5
    assert 0.002 <= timing.fastest <= timing.seconds <= timing.slowest
    assert machine().time(lambda: time.sleep(0.02), seconds=0.01).repeats == 1  # too long to be repeated


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50))))
def test_the_length_of_a_union_of_intervals(drawn: list[tuple[int, int]]) -> None:
    spans = sorted((min(pair), max(pair)) for pair in drawn)
    points = {point for start, end in spans for point in range(start, end)}
    assert covered(spans) == len(points)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (arithmetic, pretraining, lightly):
        monkeypatch.setattr(module, "SETUPS", (TINY,))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_a_small_benchmark_and_an_estimate_from_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    only = ["arithmetic", "pretraining", "options"]
    benchmark.run_benchmark(tmp_path, "cpu", 0.7, only, False, "mixmask bench")
    document = json.loads((tmp_path / "bench.json").read_text())
    steps = document["rows"]["pretraining"]
    assert steps[0]["name"] == "tiny, 32 pixels: barlowtwins"
    assert all(0.1 < row["share"] < 1.5 and row["value"] > 0 and row["limit"] for row in steps)
    assert "the time was up" in document["left_out"]["pretraining"][-1]["why"]
    assert document["left_out"]["options"] == [
        {"what": "compile and deterministic", "why": "they are options for GPUs"}
    ]
    text = (tmp_path / "bench.md").read_text()
    assert "## Arithmetic: the bounds" in text
    assert "| tiny, 32 pixels: barlowtwins" in text
    assert "- not measured: compile and deterministic: they are options for GPUs" in text
    speed = measured(tmp_path / "bench.json")
    assert min(speed.rates.values()) > 1e9
    assert (32, "barlowtwins", "none") in speed.shares
    with pytest.raises(UserError, match="exists"):
        benchmark.run_benchmark(tmp_path, "cpu", 0.1, only, False, "mixmask bench")
    assert "not measured" in capfd.readouterr().err


def test_the_loader_is_measured_by_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_rate", lambda images, workers: 100.0 * workers)
    before = {"pretraining": [Row("ResNet-50, 224 pixels: mocov2", 500.0, "images/s")]}
    *cores, needed = [row for row in loader.Loader().measure(machine(), before) if isinstance(row, Row)]
    assert [row.value for row in cores] == [100.0 * int(row.name.split()[0]) for row in cores]
    assert needed.value == pytest.approx(5.0)


def test_cores_are_those_of_the_last_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_cores", lambda: 64)
    here = machine()

    def rate(images: object, workers: int) -> float:
        here.ends = time.monotonic() + (60 if workers < 4 else -1)  # the time is up after four
        return 100.0 * workers

    monkeypatch.setattr(loader, "_rate", rate)
    before = {"pretraining": [Row("ResNet-50, 224 pixels: mocov2", 500.0, "images/s")]}
    rows = [*loader.Loader().measure(here, before)]
    assert [one.what for one in rows if isinstance(one, LeftOut)] == [
        f"the loader with {n} cores" for n in (8, 16, 32, 64)
    ]
    assert isinstance(rows[-1], Row)
    assert rows[-1].value == pytest.approx(5.0)


def test_a_rate_of_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "NUM", 40)
    assert loader._rate(loader.draw(tmp_path), 1, seconds=0.2) > 10


def test_probes_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "SETUPS", (TINY, TINY))
    monkeypatch.setattr(frozen, "CLASSES", 10)
    for number in (1, 26):
        frozen._probes(machine(), number, 4, 32)()


def test_lightly_is_left_out_with_a_line_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lightly.loss", None)
    (left,) = lightly.Lightly().measure(machine(), {})
    assert isinstance(left, LeftOut)
    assert "pip install lightly" in left.why


def test_what_ends_a_part_is_said_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry:  # not derived from Part, which would find it in other tests
        name, title, place, share = "hungry", "Hungry", 0, 0.5

        def measure(self, machine: Machine, before: dict[str, list[Row]]) -> Iterator[Row | LeftOut]:
            yield Row("first", 1.0, "x")
            raise torch.OutOfMemoryError("too much\nof it")

    monkeypatch.setattr(PARTS, "by_name", lambda: {"hungry": Hungry, "options": Options})
    benchmark.run_benchmark(tmp_path, "cpu", 0.1, [], False, "mixmask bench")
    text = (tmp_path / "bench.md").read_text()
    assert "not measured: the rest of it: too much" in text
    assert "they are options for GPUs" in text


def test_an_unknown_part_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--only: there is no part of the benchmark 'loaders'; valid: loader, "):
        benchmark.run_benchmark(tmp_path, "cpu", 0.1, ["loaders"], False, "mixmask bench")


class Measured(Machine):
    """A machine that says it has a GPU, and takes no time."""

    is_gpu = True

    def time(self, call: Call, **_: object) -> Timing:
        call()
        return Timing(1.0, 1.0, 1.0, 1)


@pytest.mark.slow
def test_the_options_are_measured_on_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Setup("tiny", ("cifar100_",), TINY.backbone, 32, ((16, 0),), 16)
    monkeypatch.setattr(options, "SETUPS", (small,))
    monkeypatch.setattr(training_step, "compile_encoders", lambda *_: None)
    here = Measured(CPU, time.monotonic() + 60)
    EmulatedGraph.replays = 0
    made: list[weakref.ref[EmulatedGraph]] = []

    def new_graph() -> EmulatedGraph:
        graph = EmulatedGraph()
        made.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(compiling, "graphs_of", lambda device: new_graph)
    found = [*Options().measure(here, {})]
    assert [one.name for one in found if isinstance(one, Row)] == ["tiny: deterministic: true", "tiny: compile: true"]
    assert EmulatedGraph.replays >= 2
    assert [graph() for graph in made] == [None]  # no cycle keeps its memory until the next setup
