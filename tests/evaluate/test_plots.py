from __future__ import annotations

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from scipy import stats

from mixmask.evaluate.collect import Run, collect
from mixmask.evaluate.dots import protocol_dots
from mixmask.evaluate.drawing import STYLES, write_plots
from mixmask.evaluate.logs import read_log
from mixmask.evaluate.plots import (
    ablations,
    budgets,
    label_efficiency,
    plots_of,
    throughput,
)
from mixmask.evaluate.published import published_numbers
from mixmask.evaluate.results import results_of
from mixmask.evaluate.statistics import summarize
from tests.evaluate.made import backbone, laboratory, write


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, ...]:
    root = write(laboratory(), tmp_path_factory.mktemp("lab"))
    for folder in (root / "pretrain").iterdir():
        lines = [
            {"step": step, "of": 40, "loss": 8 - step / 10, "clean": 4.0, "mixmask": 2.0} for step in range(10, 41, 10)
        ]
        lines += [{"step": 40, "of": 40, "knn/top1": 50.0}]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5')
    return collect(root).distinct


@pytest.mark.slow
def test_every_kind_of_plot_is_drawn_as_png_and_svg(runs: tuple[Run, ...], tmp_path: Path) -> None:
    plots = plots_of(runs, published_numbers())
    ids = [plot.id for plot in plots]
    assert len(ids) == len(set(ids))
    for start in (
        "training-",
        "budget-",
        "mix.grid-",
        "mix.ratio-",
        "dots-coco2017",
        "dots-voc2007",
        "dots-cifar100-knn",
        "labels-",
        "throughput",
    ):
        assert any(id.startswith(start) for id in ids), start
    written = write_plots(plots, tmp_path)
    assert len(written) == 3 * len(plots)
    for path in written:
        if path.suffix == ".png":
            assert np.asarray(Image.open(path).convert("L")).std() > 5  # something is drawn
        elif path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF-")
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    again = plots_of(runs, published_numbers())
    assert all(plot.render("svg") == (tmp_path / f"{plot.id}.svg").read_bytes() for plot in again[::4])


def line_of(plot: object, label: str) -> list[tuple[float, float]]:
    """The points of the line with a label."""
    for axes in plot.figure.axes:
        for container in axes.containers:
            if container.get_label() == label:
                return [tuple(point) for point in container.lines[0].get_xydata().tolist()]
        for line in axes.lines:
            if line.get_label() == label:
                return [tuple(point) for point in line.get_xydata().tolist()]
    raise AssertionError(f"no line {label}")


def dot_of(panel: object, label: str) -> tuple[float, float]:
    """The mean and half the interval in the row whose label begins so."""
    labels = [text.get_text() for text in panel.figure.axes[0].get_yticklabels()]
    (row,) = [number for number, text in enumerate(labels) if text.startswith(label)]
    (container,) = [one for one in panel.containers if one.lines[0].get_ydata()[0] == -row]
    ends = container.lines[2][0].get_segments()[0]
    return float(container.lines[0].get_xdata()[0]), float(ends[1][0] - ends[0][0]) / 2


@pytest.mark.slow
def test_points_are_the_means_of_the_runs(runs: tuple[Run, ...]) -> None:
    found = results_of(runs)
    budget = next(plot for plot in budgets(found) if plot.id == "budget-cifar100-knn")
    assert line_of(budget, "Vanilla") == [(200, 60.0), (600, 64.0), (1000, pytest.approx(65.62))]
    assert [x for x, _ in line_of(budget, "MixMask")] == [200, 600, 1000]
    grid, ratio = ablations(found, published_numbers())
    assert line_of(grid, "MixMask") == [(0, pytest.approx(68.32)), (1, 67.9), (2, 67.0)]
    assert line_of(grid, "published") == [(0, 68.1), (1, 67.6), (2, 67.5)]
    assert [label.get_text() for label in ratio.figure.axes[0].get_xticklabels()] == [
        "0.25", "0.5", "uniform(0,1)", "uniform(0.25,0.75)",
    ]  # fmt: skip
    (labels,) = label_efficiency(found)
    assert line_of(labels, "MixMask (MoCo v2, 200 epochs)") == [(1, 44.0), (10, 64.0), (100, 77.0)]
    dots = {plot.id[:16]: plot for plot in protocol_dots(found) if "engine detectron2" in plot.title}
    assert {*dots} == {"dots-coco2017-de", "dots-voc2007-det"}
    shown = [dot_of(panel, "MixMask") for panel in dots["dots-voc2007-det"].figure.axes]
    assert [mean for mean, _ in shown] == pytest.approx([57.8, 83.0, 64.9])
    values = [57.8 + shift for shift in (0.1, -0.2, 0.3, 0.0, -0.2)]
    half = shown[0][1]
    assert half == pytest.approx(stats.t.interval(0.95, 4, 0.0, stats.sem(values))[1], rel=0.5)
    assert half == pytest.approx(
        summarize(
            [
                r.value
                for r in found
                if r.metric == "bbox/AP"
                and r.run.record.method == "mixmask"
                and r.run.record.settings["engine"] == "detectron2"
                and r.run.record.dataset == "voc2007"
            ]
        ).half_interval
    )
    (rates,) = throughput(runs)
    assert {bar.get_width() for bar in rates.figure.axes[0].patches} == {5120.0}


def test_nothing_to_plot_is_no_plot() -> None:
    assert plots_of([]) == []
    lonely = Run(Path("absent"), backbone().model_copy(update={"metrics": {"loss": 1.0}}))
    assert plots_of([lonely]) == []


def test_damaged_logs_give_their_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1, "loss": 2.0}\n[3]\n{"step": "x"}\n\xff\xfe\n{"step": 2, "loss": NaN}\n{"st')
    assert [entry["step"] for entry in read_log(log)] == [1, 2]
    assert read_log(tmp_path / "absent") == []


def test_colours_are_told_apart_without_colour() -> None:
    """No two methods share a marker and a dash, and as colour-blind eyes see them (Viénot 1999) colours stay apart."""
    assert len({(marker, dash) for _, marker, dash in STYLES.values()}) == len(STYLES)
    protan = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])
    deutan = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    for matrix in (protan, deutan):
        seen = [np.clip(matrix @ np.array(to_rgb(colour)) ** 2.2, 0, 1) ** (1 / 2.2) for colour, *_ in STYLES.values()]
        pairs = [np.linalg.norm(a - b) for n, a in enumerate(seen) for b in seen[:n]]
        assert min(pairs) > 0.08


def test_mathematics_in_names_is_text() -> None:
    records = [backbone(framework=name) for name in ("$\\frac{", "a_b^c", "名前")]
    runs = [Run(Path(str(n)), record) for n, record in enumerate(records)]
    (plot,) = throughput(runs)
    assert Image.open(io.BytesIO(plot.render("png"))).width > 100
