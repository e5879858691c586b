"""Published tables as YAML: what may stand in them, and that every number is where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mixmask.engine.config import recipe_of_text
from mixmask.engine.errors import ConfigError
from mixmask.evaluate.collect import collect
from mixmask.evaluate.layouts import layouts
from mixmask.evaluate.published import PublishedTable, published_numbers, published_tables
from mixmask.evaluate.results import results_of
from mixmask.evaluate.table import build
from tests.evaluate.made import backbone, transfer, write

TABLE: dict[str, Any] = {
    "title": "ours",
    "rows": {"method": "method"},
    "columns": ["dataset"],
    "protocols": {"knn": {"title": "kNN", "metrics": {"knn/top1": "top-1"}}},
    "sources": {"us": "our report"},
    "numbers": [
        {"dataset": "x", "framework": "moco", "protocol": "knn", "metric": "knn/top1", "method": {"a": 1, "b": 2.5}}
    ],
}


def read(**changes: Any) -> PublishedTable:
    return recipe_of_text(PublishedTable, yaml.safe_dump({**TABLE, **changes}), "ours.yaml")


def test_one_key_of_a_number_has_several_values() -> None:
    first, second = read().published("ours")
    assert (first.method, first.value, first.where) == ("a", 1.0, "our report")
    assert (second.method, second.value, second.title) == ("b", 2.5, "kNN")
    (own,) = read(
        numbers=[{**TABLE["numbers"][0], "method": "a", "mix.switch": {False: 3}, "pretrain_epochs": 10}]
    ).published("1")
    assert (own.setting, own.pretrain_epochs, own.where) == (("mix.switch", "false"), 10.0, "our report, table 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"varied": ["mix.grid"]}, "either rows or varied"),
        ({"colums": []}, r"unknown key 'colums'.*Did you mean 'columns'"),
        ({"columns": []}, "columns: .*needs at least 1"),
        ({"numbers": [{**TABLE["numbers"][0], "method": "a"}]}, r"numbers\.0: one key has several values .*, got 0"),
        ({"numbers": [{"dataset": "x", "method": {"a": 1}}]}, r"numbers\.0: framework, metric, protocol is missing"),
        (
            {"numbers": [{**TABLE["numbers"][0], "protocol": "svm"}]},
            r"numbers\.0: protocol svm: is not under protocols",
        ),
        ({"numbers": [{**TABLE["numbers"][0], "source": "them"}]}, r"numbers\.0: source them: is not under sources"),
        ({"numbers": [{**TABLE["numbers"][0], "method": {"a": "x"}}]}, r"numbers\.0: method: a number was expected"),
        ({"numbers": [{**TABLE["numbers"][0], "k": 1, "lr": 1}]}, r"numbers\.0: k and lr: one setting at most"),
    ],
)
def test_a_table_that_is_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^ours\.yaml.*{message}"):
        read(**changes)


def test_every_number_has_one_place() -> None:
    """None is lost because its table's conditions leave it out, and none stands twice."""
    places = [number for layout in layouts().values() for _, number in layout.published]
    assert len(places) == len({*places}) == len(published_numbers())
    ours = ("1", "2", "3", "4", "5", "semisup", "7", "7-2x", "code")
    assert sum(number.table in ours for number in places) == 134


def test_titles_agree_with_those_that_protocols_write_into_records() -> None:
    """The tables name protocols whose numbers nobody has run; records bring their own titles. Both must be the same."""
    from mixmask.engine.builtin_configs import configs_folder
    from mixmask.transfer.recipe import load_transfer_recipe

    recipes = [
        load_transfer_recipe(file, ["backbone=b"])
        for file in sorted((configs_folder() / "transfer").glob("*.yaml"))
        if file.stem != "robustness"  # reads the classifier that it is given
    ]
    for table in published_tables().values():
        for recipe in recipes:
            words = table.words(recipe.record_name)
            if words is not None:
                assert words.title == recipe.title
                assert words.metrics.keys() & recipe.headlines.keys()


def test_means_and_mean_ranks_stand_beside_whole_rows(tmp_path: Path) -> None:
    """Ranks are among the rows with a number in every column; ties share the mean of their ranks."""
    values = {"vanilla": (60.0, 70.0), "unmix": (62.0, 70.0), "mixmask": (64.0, None)}
    records = []
    for seed, (method, (cifar, food)) in enumerate(values.items()):
        of = backbone(method=method, seed=seed)
        records.append(of)
        for dataset, value in (("cifar10", cifar), ("food101", food)):
            if value is not None:
                words = {
                    "protocol": "logreg",
                    "metrics": {"logreg/top1": value},
                    "headlines": {"logreg/top1": "logreg top-1"},
                }
                records.append(transfer(of, "knn", {"knn/top1": value}, dataset=dataset).model_copy(update=words))
    runs = collect(write(records, tmp_path)).distinct
    table = build(layouts()["frozen"], results_of(runs))
    rows = {line.row[1]: line.row[-2:] for line in table.lines if any(cell and cell.results for cell in line.cells)}
    assert table.row_names[-2:] == ("mean", "mean rank")
    assert rows == {"Vanilla": ("65.0", "1.75"), "Un-Mix": ("66.0", "1.25"), "MixMask": ("–", "–")}
