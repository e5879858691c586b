"""One odd file among a folder of runs is left out with a reason, or shown; it never ends a command with a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmask.evaluate.card import write_card
from mixmask.evaluate.collect import as_text, collect, frame, write_parquet
from mixmask.evaluate.comparison import compare
from mixmask.evaluate.drawing import write_plots
from mixmask.evaluate.layouts import choose
from mixmask.evaluate.plots import plots_of
from mixmask.evaluate.render import SUFFIXES, render_all
from mixmask.evaluate.report import write_report
from mixmask.evaluate.results import results_of
from mixmask.evaluate.table import build
from mixmask.evaluate.verify import expectations
from tests.evaluate.made import backbone, transfer, write

Document = dict[str, Any]


def at(*keys: str, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


LEFT_OUT: dict[str, Callable[[Document], None]] = {
    "ratio of words": at("pretraining", "mix", "ratio", value=["a", "b"]),
    "ratio with null": at("pretraining", "mix", "ratio", value=[None, 1]),
    "grid is a mapping": at("pretraining", "mix", "grid", value={}),
    "mix is a list": at("pretraining", "mix", value=[1]),
    "headlines are a list": at("headlines", value=["knn/top1"]),
    "no runs make a result": at("num_seeds", value=0),
    "huge metric": at("metrics", "knn/top1", value=1e308),
    "metric is a word": at("metrics", "knn/top1", value="many"),
    "half a character": at("settings", "note", value="\ud800"),
    "infinite seconds": at("seconds", value=float("inf")),
    "infinite epochs": at("pretrain_epochs", value=float("inf")),
    "method is a list": at("method", value=["magic"]),
    "method is a book": at("method", value="x" * 200),
    "another key": at("surprise", value=1),
}
SHOWN: dict[str, Callable[[Document], None]] = {
    "somebody's own method": at("method", value="magic"),
    "batch size is a list": at("pretraining", "batch_size", value=[512]),
    "device is a list": at("environment", "device", value=["a", "b"]),
    "device is a mapping": at("environment", "device", value={"a": {"b": [1]}}),
    "engine is a list": at("settings", "engine", value=["x"]),
    "nothing known": lambda document: document.update(settings={}, recipe={}, pretraining={}, environment={}, data={}),
    "huge integers": at("settings", "seed_of_seeds", value=10**40),
    "deep settings": at("settings", "deep", value={"a": {"b": {"c": [1, {"d": None}]}}}),
    "fixed name as a metric": at("metrics", value={"knn/top1": 50.0, "run": 1.0, "dataset": 7.0}),
    "slashes": at("metrics", value={"knn/top1": 50.0, "/": 1.0, "a/b/c/d": 2.0, "": 3.0}),
    "mathematics": at("framework", value="$\\frac{$"),
    "fingerprint of signs": at("fingerprint", value="a b\"'é%/x<"),
    "no epochs": at("pretrain_epochs", value=None),
    "nearly all epochs": at("pretrain_epochs", value=999.9999),
    "unknown protocol": at("protocol", value="segmentation"),
    "no data set": at("dataset", value=""),
    "boolean k": at("recipe", "k", value=True),
    "own name in the recipe": at("recipe", value={"": 1, ".": 2, "a.b": 3}),
}


def folder_with(root: Path, *changes: Callable[[Document], None]) -> Path:
    """Three sound runs, and an odd one for every change."""
    of = backbone()
    sound = [
        of,
        transfer(of, "knn", {"knn/top1": 50.0}),
        transfer(backbone(method="vanilla"), "knn", {"knn/top1": 40.0}),
    ]
    write(sound, root)
    for number, change in enumerate(changes):
        document = transfer(backbone(seed=3 + number), "knn", {"knn/top1": 60.0}).model_dump(by_alias=True, mode="json")
        change(document)
        odd = root / "transfer" / f"odd{number}"
        odd.mkdir()
        (odd / "record.json").write_text(json.dumps(document))
        (odd / "recipe.yaml").write_bytes(b"\xff\xfe: [")
    return root


def use(root: Path, out: Path, drawn: bool = True) -> None:
    """Everything that reads a folder of runs; plots and pages only if they are to be drawn."""
    collection = collect(root)
    runs = collection.distinct
    table = frame(runs, per_class=True)
    as_text(table, "csv").encode()
    json.loads(as_text(table, "json"))
    write_parquet(table, out / "r.parquet")
    tables = [build(layout, results_of(runs)) for layout in choose(None, ())]
    for form in SUFFIXES.values():
        render_all(tables, form).encode()
    plots = plots_of(runs)
    if drawn:
        write_plots(plots, out / "plots")
        write_report(collection, out / "report")
    expectations(collection)
    by_method = {method: [run for run in runs if run.record.method == method] for method in ("mixmask", "vanilla")}
    compare(by_method["mixmask"], by_method["vanilla"])
    write_card(next((root / "pretrain").iterdir()), root, "mit").encode()


@pytest.mark.parametrize("name", LEFT_OUT)
def test_records_that_make_no_sense_are_left_out(name: str, tmp_path: Path) -> None:
    root = folder_with(tmp_path / "runs", LEFT_OUT[name])
    assert [path.parent.name for path, _ in collect(root).damaged] == ["odd0"]
    assert len(collect(root).runs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_odd_records_are_shown(name: str, tmp_path: Path) -> None:
    root = folder_with(tmp_path / "runs", SHOWN[name])
    assert collect(root).damaged == ()
    use(root, tmp_path, drawn=False)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(2))
def test_odd_records_are_drawn(start: int, tmp_path: Path) -> None:
    root = folder_with(tmp_path / "runs", *[*SHOWN.values()][start::2])
    assert collect(root).damaged == ()
    use(root, tmp_path)


@pytest.mark.slow
def test_odd_logs_are_drawn_as_far_as_they_go(tmp_path: Path) -> None:
    root = folder_with(tmp_path / "runs", lambda document: None)
    lines = [
        '{"step": 1, "of": null, "loss": 2.0}',
        '{"step": 2, "of": "x", "loss": 1e308}',
        '{"step": 3, "of": 10, "loss": ' + "9" * 400 + "}",
        "[" * 100_000,
        '{"step": 4, "of": 10, "loss": 1.0, "$\\\\frac{$": 2.0, "flag": true}',
        '{"step": 5, "of": 10, "loss": -Infinity}',
    ]
    (next((root / "pretrain").iterdir()) / "log.jsonl").write_text("\n".join(lines))
    use(root, tmp_path)


def test_two_records_of_one_run_that_disagree_are_said(tmp_path: Path) -> None:
    record = transfer(backbone(), "knn", {"knn/top1": 65.0})
    for order in ((65.0, 12.0), (12.0, 65.0)):
        root = tmp_path / str(order[0])
        for folder, value in zip(("a", "b"), order, strict=True):
            (root / folder).mkdir(parents=True)
            record.model_copy(update={"metrics": {"knn/top1": value}}).write(root / folder / "record.json")
        collection = collect(root)
        assert [run.record.metrics["knn/top1"] for run in collection.distinct] == [12.0]  # wherever it lies
        assert "other numbers than" in collection.remarks()


def test_a_hostile_architecture_makes_no_card(tmp_path: Path) -> None:
    from mixmask.engine.errors import UserError

    record = backbone().model_copy(update={"arch": "resnet18()\n```\n<img src=x onerror=alert(1)>"})
    (tmp_path / "pretrain" / "x").mkdir(parents=True)
    record.write(tmp_path / "pretrain" / "x" / "record.json")
    with pytest.raises(UserError, match="no architecture"):
        write_card(tmp_path / "pretrain" / "x", None, "mit")
    sneaky = backbone().model_copy(update={"data": {"train": "<script>\n\n# x"}})
    (tmp_path / "pretrain" / "y").mkdir(parents=True)
    sneaky.write(tmp_path / "pretrain" / "y" / "record.json")
    assert "<script>" not in write_card(tmp_path / "pretrain" / "y", None, "mit")
