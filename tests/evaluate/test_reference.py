"""A published number stands beside a run only if the run was made as the recipe of its row is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmask.engine.records import Record
from mixmask.evaluate import reference
from mixmask.evaluate.collect import Run
from mixmask.evaluate.layouts import choose
from mixmask.evaluate.published import published_numbers
from mixmask.evaluate.reference import MAY_DIFFER, may_differ
from mixmask.evaluate.results import results_of
from mixmask.evaluate.table import Table, build
from mixmask.evaluate.verify import verify
from mixmask.launch.suite.reference import FILE, text
from tests.evaluate.made import backbone, transfer

PLACES = [number for number in published_numbers() if number.table in ("5", "7", "4") and number.source == "paper"]
ROWS = sorted(
    {(n.dataset, n.framework, n.method, n.protocol, n.table, n.pretrain_epochs or 800.0) for n in PLACES}
    & {
        (*place, table, epochs)
        for place in reference._rows()
        for table, epochs in (("5", 1000.0), ("5", 200.0), ("7", 800.0), ("4", 200.0), ("4", 800.0))
    }
)
METRICS = {"knn": "knn/top1", "linear": "linear/top1", "detect_voc": "bbox/AP", "detect_coco": "bbox/AP"}


def test_the_file_is_what_the_recipes_and_suites_come_to() -> None:
    assert FILE.read_text() == text(), (
        "a shipped recipe or suite was changed: run `make reference` and read the difference"
    )


def made_as(dataset: str, framework: str, method: str, protocol: str, epochs: float) -> Record:
    """A run that was made exactly as the row's recipes are."""
    source = dataset if protocol in ("knn", "linear") else "imagenet1k"
    record = transfer(backbone(source, framework, method, epochs), protocol, {METRICS[protocol]: 50.0}, dataset=dataset)
    row = reference._rows()[dataset, framework, method, protocol]
    document = reference._document()
    return record.model_copy(
        update={
            "recipe": copy.deepcopy(document["transfer"][row["transfer"]]),
            "pretraining": {**copy.deepcopy(document["pretrain"][row["pretrain"]]), "epochs": epochs},
            "settings": {},
        }
    )


def published_beside(table: Table) -> bool:
    return any(cell.results and cell.published for line in table.lines for cell in line.cells if cell is not None)


def table_of(record: Record, id: str) -> Table:
    return build(choose(id, ())[0], results_of([Run(Path("r"), record)]))


def leaves(tree: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*before, key))
        else:
            yield (*before, key)


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, 1]
    return "another" if isinstance(value, str) else 1


def set_leaf(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for key in place[:-1]:
        tree = tree.setdefault(key, {})
    tree[place[-1]] = value


@pytest.mark.parametrize("row", ROWS)
def test_the_rows_own_recipe_stands_beside_its_number(row: tuple[Any, ...]) -> None:
    dataset, framework, method, protocol, id, epochs = row
    beside = published_beside(table_of(made_as(dataset, framework, method, protocol, epochs), id))
    assert beside is (
        method != "mscn"
    )  # MSCN's published numbers come from its own recipe, which is not this project's


KEYS = [
    (row, side, place)
    for row in ROWS
    if row[2] != "mscn"
    for side in ("recipe", "pretraining")
    for place in leaves(getattr(made_as(*row[:4], row[5]), side))
]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(KEYS))
def test_any_other_value_of_any_key_sends_the_number_away(case: tuple[Any, ...]) -> None:
    row, side, place = case
    dataset, framework, method, protocol, id, epochs = row
    record = made_as(dataset, framework, method, protocol, epochs)
    tree = copy.deepcopy(getattr(record, side))
    old = tree
    for key in place:
        old = old[key]
    set_leaf(tree, place, changed(old))
    update: dict[str, Any] = {side: tree}
    key = ".".join(place)
    if side == "pretraining" and key == "epochs":
        update["pretrain_epochs"] = epochs + 1
    if side == "pretraining" and key == "backbone.arch":
        update["arch"] = "resnet101"
    if side == "pretraining" and key == "data.name":
        update["pretrain_dataset"] = "another"
    if side == "recipe" and key in ("data.name", "protocol"):
        return  # the record's own dataset and protocol say where it stands
    table = table_of(record.model_copy(update=update), id)
    assert published_beside(table) is may_differ(key), (key, table.footnotes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([row for row in ROWS if row[2] != "mscn"]), st.sampled_from(["recipe", "pretraining"]))
def test_a_key_that_the_recipe_does_not_have_sends_the_number_away(row: tuple[Any, ...], side: str) -> None:
    record = made_as(*row[:4], row[5])
    more = record.model_copy(update={side: {**getattr(record, side), "new_option": 3}})
    assert not published_beside(table_of(more, row[4]))


DEVIATIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("cifar100 moco mixmask knn", {"mix": {"partner": "random"}}, {}),
    ("cifar100 moco mixmask knn", {"optimizer": {"momentum": 0.5}}, {}),
    ("cifar100 simclr mixmask linear", {"framework": {"projector_layers": 3}}, {}),
    ("cifar100 simclr mixmask linear", {"optimizer": {"weight_decay": 0.1}}, {}),
    ("cifar100 simclr mixmask linear", {}, {"weight_decay": 0.1}),
    ("imagenet1k mocov2 mixmask linear", {"optimizer": {"weight_decay": 0.1}}, {}),
    ("voc2007 mocov2 mixmask detect_voc", {}, {"min_size_train": [160], "min_size_test": 160}),
    ("voc2007 mocov2 mixmask detect_voc", {}, {"data": {"train": ["2007/trainval"]}}),
    ("voc2007 mocov2 mixmask detect_voc", {}, {"precise_bn_iterations": 0}),
    ("voc2007 mocov2 mixmask detect_voc", {}, {"roi": {"batch_per_image": 16}}),
    ("cifar100 moco mixmask knn", {"backbone": {"stem": "standard"}}, {}),
    ("cifar100 moco mixmask knn", {"augment": {"jitter_probability": 0.0}}, {}),
    ("cifar100 simsiam mixmask linear", {"warmup_epochs": 0.0}, {}),
    ("imagenet1k mocov2 mixmask linear", {}, {"gamma": 0.5}),
    ("imagenet1k mocov2 mixmask linear", {}, {"evaluation": {"crop": 64}}),
    ("cifar100 moco mixmask knn", {}, {"features": "trunk"}),
]


@pytest.mark.parametrize(("place", "pretraining", "recipe"), DEVIATIONS)
def test_runs_of_another_making_have_a_footnote_and_prove_nothing(
    place: str, pretraining: dict[str, Any], recipe: dict[str, Any]
) -> None:
    dataset, framework, method, protocol = place.split()
    id, epochs = ("7", 800.0) if protocol.startswith("detect") else ("5", 200.0 if dataset == "imagenet1k" else 1000.0)
    record = made_as(dataset, framework, method, protocol, epochs)
    assert published_beside(table_of(record, id))
    trees = {}
    for side, changes in (("pretraining", pretraining), ("recipe", recipe)):
        tree = copy.deepcopy(getattr(record, side))
        for key in leaves(changes):
            value: Any = changes
            for part in key:
                value = value[part]
            set_leaf(tree, key, value)
        trees[side] = tree
    other = record.model_copy(update=trees)
    table = table_of(other, id)
    assert not published_beside(table)
    assert any("this row's recipe" in note for _, note in table.footnotes)
    if recipe:
        from mixmask.engine.expected import Expectation
        from mixmask.evaluate.collect import Collection

        metric = METRICS[protocol]
        wanted = Expectation(metric=metric, value=50.0, tolerance=1.0, source="x", dataset=dataset)
        of = backbone("imagenet1k" if id == "7" else dataset, framework, method, epochs)
        of = of.model_copy(update={"expected": (wanted,)})
        both = [Run(Path("p"), of), Run(Path("r"), other.model_copy(update={"parent": of.fingerprint}))]
        (check,) = verify(Collection(Path("x"), tuple(both), (), ()))
        assert check.reproduced is None
        assert "this row's recipe" in check.words()


def test_what_may_differ_has_a_reason() -> None:
    assert all(len(reason.split()) >= 3 for reason in MAY_DIFFER.values())
    assert may_differ("pretrain.monitor.k")
    assert not may_differ("pretrain.monitored")
