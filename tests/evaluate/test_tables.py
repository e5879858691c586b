from __future__ import annotations

import os
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmask.engine.errors import DataError, UserError
from mixmask.engine.records import Record, said_before_schema_3
from mixmask.evaluate.collect import Run
from mixmask.evaluate.layouts import choose, layouts, methods_by_protocols, pivot
from mixmask.evaluate.published import COLUMNS, published_numbers, read_published
from mixmask.evaluate.render import TableFormat, render
from mixmask.evaluate.results import results_of
from mixmask.evaluate.table import NOT_RECORDED, Table, TableCell, build
from tests.evaluate.made import backbone, laboratory, transfer

GOLDEN = Path(__file__).parent / "golden"
IDS = ("1", "2", "3", "4", "5", "semisup", "7", "7-2x", "methods")


def table_of(records: list[Record], id: str) -> Table:
    runs = [Run(Path(f"runs/{record.fingerprint}"), record) for record in records]
    return build(choose(id, ())[0], results_of(runs))


def cells(table: Table) -> list[tuple[tuple[str, ...], tuple[str, ...], TableCell]]:
    return [
        (line.row, column, cell)
        for line in table.lines
        for column, cell in zip(table.columns, line.cells, strict=True)
        if cell is not None
    ]


def numbers(table: Table) -> set[tuple[Any, ...]]:
    """What stands in the cells, without the letters of footnotes."""
    return {
        (
            row,
            column,
            tuple(result.value for result in cell.results),
            cell.published.value if cell.published else None,
            cell.best,
            cell.near_best,
            cell.few,
        )
        for row, column, cell in cells(table)
    }


def the_cell(table: Table, row: tuple[str, ...], column: tuple[str, ...], number: int = 0) -> TableCell:
    return [cell for r, c, cell in cells(table) if (r, c) == (row, column)][number]


CIFAR = ("CIFAR-100", "MoCo", "kNN")


@pytest.mark.parametrize("form", ["term", "md", "latex", "csv", "html"])
@pytest.mark.parametrize("id", IDS)
def test_golden_files(id: str, form: TableFormat) -> None:
    """After a change that is meant: ``UPDATE_GOLDEN=1 pytest tests/evaluate/test_tables.py``, and read the difference."""
    text = render(table_of(laboratory(), id), form, width=140)
    path = GOLDEN / f"table_{id}.{ {'term': 'txt', 'latex': 'tex'}.get(form, form) }"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_mean_standard_deviation_and_number_are_those_of_the_statistics_module() -> None:
    cell = the_cell(table_of(laboratory(), "5"), ("Vanilla",), CIFAR)
    values = [65.6 + shift for shift in (0.1, -0.2, 0.3, 0.0, -0.1)]
    assert cell.summary is not None
    assert cell.summary.n == 5
    assert cell.summary.mean == pytest.approx(statistics.fmean(values))
    assert cell.summary.std == pytest.approx(statistics.stdev(values))
    assert cell.published is not None
    assert cell.published.value == 65.7
    assert cell.difference == pytest.approx(statistics.fmean(values) - 65.7)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_any_values(values: list[float]) -> None:
    records = [transfer(backbone(seed=seed), "knn", {"knn/top1": value}) for seed, value in enumerate(values)]
    summary = the_cell(table_of(records, "5"), ("MixMask",), CIFAR).summary
    assert summary is not None
    assert summary.n == len(values)
    assert summary.mean == pytest.approx(statistics.mean(values), abs=1e-9)
    if len(values) > 1:
        assert summary.std == pytest.approx(statistics.stdev(values), abs=1e-7)
    else:
        assert summary.std is None


def others() -> list[Record]:
    """The same backbones and protocols, each with one thing about the protocol changed."""
    imagenet, longer = (backbone("imagenet1k", "mocov2", "mixmask", epochs=epochs) for epochs in (200, 800))
    ap = {"bbox/AP": 99.0, "bbox/AP50": 99.0, "bbox/AP75": 99.0}
    linear = transfer(imagenet, "linear", {"linear/top1": 99.0})
    return [
        transfer(backbone(), "knn", {"knn/top1": 99.0}, k=10),
        transfer(backbone(), "knn", {"knn/top1": 99.0}, temperature=0.07),
        transfer(backbone(epochs=5), "knn", {"knn/top1": 99.0}),
        transfer(backbone(batch_size=64), "knn", {"knn/top1": 99.0}),
        transfer(imagenet, "linear", {"linear/top1": 99.0}, epochs=50),
        transfer(imagenet, "linear", {"linear/top1": 99.0}, lr=3.0),
        linear.model_copy(update={"settings": {**linear.settings, "epoch": "best"}, "fingerprint": "best"}),
        transfer(imagenet, "semisup_1", {"semisup/top1": 99.0}, epochs=60),
        transfer(longer, "detect_voc", ap, batch_size=8),
        transfer(longer, "detect_coco", ap, iterations=180000),
        transfer(imagenet, "knn", {"knn/top1": 99.0}).model_copy(update={"data": {"test": "other images"}}),
    ]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(range(len(others()))), min_size=1, max_size=4, unique=True), st.sampled_from(IDS))
def test_a_run_of_another_protocol_never_changes_a_cell(added: list[int], id: str) -> None:
    before, more = laboratory(), others()
    assert numbers(table_of(before, id)) <= numbers(table_of([*before, *(more[n] for n in added)], id))


@pytest.mark.parametrize("number", range(len(others())))
def test_a_run_of_another_protocol_has_a_line_and_a_footnote_of_its_own(number: int) -> None:
    record = others()[number]
    table = table_of([*laboratory(), record], "methods")
    found = [cell for _, _, cell in cells(table) if any(r.run.record is record for r in cell.results)]
    assert found
    assert all(len(cell.results) == 1 and cell.published is None for cell in found)
    line = next(line for line in table.lines if found[0] in line.cells)
    assert (
        line.marks or found[0].marks or number in (2, 10)
    )  # epochs and a first kNN on ImageNet have a place of their own


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(IDS))
def test_the_order_of_runs_does_not_matter(seed: int, id: str) -> None:
    shuffled = laboratory()
    random.Random(seed).shuffle(shuffled)
    assert render(table_of(shuffled, id), "csv") == render(table_of(laboratory(), id), "csv")


def test_footnotes_say_what_differs() -> None:
    seven = table_of(laboratory(), "7")
    texts = [text for _, text in seven.footnotes]
    assert texts == [
        "pretrain.epochs 800 (the publication does not say)",
        "engine detectron2",
        "engine torchvision",
        "engine torchvision (published: Detectron2; the two are proven equal)",
        "fewer than 5 runs: on VOC runs differ by about 0.2 AP, 0.2 AP50, 0.4 AP75",
    ]
    letters = {text: letter for letter, text in seven.footnotes}
    torchvision = the_cell(seven, ("MoCo v2", "MixMask"), ("VOC 2007", "box AP"), 1)
    assert set(torchvision.marks) == {letter for text, letter in letters.items() if text != "engine detectron2"}
    assert torchvision.few
    assert torchvision.published is not None  # the engines are proven equal, and a footnote names the engine
    five = the_cell(seven, ("MoCo v2", "MixMask"), ("VOC 2007", "box AP"), 0)
    assert not five.few
    assert five.published is not None


def test_twice_the_schedule_is_a_table_of_its_own() -> None:
    twice = [41.1, 60.8, 44.3, 36.3, 57.6, 38.4]
    assert [cell.results[0].value for _, _, cell in cells(table_of(laboratory(), "7-2x"))] == pytest.approx(twice)
    shown = [result.value for _, _, cell in cells(table_of(laboratory(), "7")) for result in cell.results]
    assert not {*twice} & {*shown}


def test_missing_runs_leave_the_published_number() -> None:
    table = table_of(laboratory(), "5")
    cell = the_cell(table, ("Un-Mix",), ("CIFAR-100", "BYOL", "linear"))
    assert cell.summary is None
    assert cell.published is not None
    assert "– [70.0]" in render(table, "md")
    missing = [cell for row, column, cell in cells(table) if row == ("Random",) and column != CIFAR]
    assert len(missing) == len(table.columns) - 1
    assert {(cell.summary, cell.published) for cell in missing} == {(None, None)}


def test_only_a_faithful_run_stands_beside_the_published_number() -> None:
    records = [transfer(backbone(), "knn", {"knn/top1": 60.0}, k=20)]
    table = table_of(records, "5")
    published, own = (the_cell(table, ("MixMask",), CIFAR, n) for n in (0, 1))
    assert (published.summary, published.published and published.published.value) == (None, 68.4)
    assert (own.summary and own.summary.mean, own.published) == (60.0, None)


def test_the_best_is_marked_and_what_noise_cannot_tell_from_it() -> None:
    def runs(method: str, *values: float) -> list[Record]:
        return [
            transfer(backbone(method=method, seed=seed), "knn", {"knn/top1": value})
            for seed, value in enumerate(values)
        ]

    records = [*runs("mixmask", 70.0, 70.4, 70.2), *runs("unmix", 69.9, 70.3, 70.1), *runs("vanilla", 60.0, 60.2, 60.4)]
    table = table_of(records, "5")
    marks = {
        row[0]: (cell.best, cell.near_best) for row, column, cell in cells(table) if column == CIFAR and cell.results
    }
    assert marks == {"MixMask": (True, False), "Un-Mix": (False, True), "Vanilla": (False, False)}
    single = table_of([*runs("mixmask", 70.0), *runs("unmix", 69.99)], "5")
    assert not the_cell(single, ("Un-Mix",), CIFAR).near_best  # the noise of single runs is not known


def test_a_foreign_checkpoint_stands_beside_the_published_number_with_a_remark() -> None:
    record = transfer(backbone("imagenet1k", "mocov2", "vanilla", epochs=200), "detect_voc", {"bbox/AP": 57.0})
    foreign = record.model_copy(update={"pretraining": {}, "pretrain_epochs": None, "pretrain_dataset": None})
    table = table_of([foreign], "7")
    cell = the_cell(table, ("MoCo v2", "Vanilla"), ("VOC 2007", "box AP"))
    assert cell.published is not None
    assert NOT_RECORDED in [text for _, text in table.footnotes]


def test_recipes_that_differ_elsewhere_are_told_apart() -> None:
    one = transfer(backbone(), "knn", {"knn/top1": 50.0})
    other = one.model_copy(
        update={"protocol_fingerprint": "another", "fingerprint": "x", "metrics": {"knn/top1": 60.0}}
    )
    table = table_of([one, other], "methods")
    assert sorted(cell.results[0].value for _, _, cell in cells(table)) == [50.0, 60.0]
    assert all("measured as" in text for _, text in table.footnotes)


def test_an_ablation_stands_where_it_belongs() -> None:
    table = table_of(laboratory(), "1")
    default = [
        row
        for row, column, cell in cells(table)
        if column == CIFAR and cell.results and cell.summary and cell.summary.n == 5
    ]
    assert default == [
        ("Grid size", "2 × 2"),
        ("Masking strategy", "discrete"),
        ("Masking ratio", "0.5"),
        ("Switch mixture", "yes"),
    ]
    assert the_cell(table, ("Masking ratio", "uniform(0.25,0.75)"), CIFAR).results[0].value == 67.7
    two_things = transfer(backbone(mix={"grid": 8, "switch": False}), "knn", {"knn/top1": 1.0})
    assert numbers(table_of([*laboratory(), two_things], "1")) == numbers(table)


def test_every_published_number_of_the_tables_is_shown() -> None:
    shown = {
        cell.published for layout in layouts().values() for _, _, cell in cells(build(layout, [])) if cell.published
    }
    assert shown == {*published_numbers()}


def test_other_percentages_have_columns_of_their_own() -> None:
    record = transfer(backbone(), "semisup_10", {"semisup/top1": 40.0})
    record = record.model_copy(update={"protocol": "semisup_5", **said_before_schema_3("semisup_5")})
    assert ("CIFAR-100", "5 % of labels") in table_of([record], "semisup").columns


def test_a_pivot_has_any_rows_and_columns() -> None:
    runs = [Run(Path("r"), record) for record in laboratory()]
    found = [result for result in results_of(runs) if result.metric == "knn/top1"]
    layout = pivot(["method"], ["dataset", "pretrain_epochs"], {key for result in found for key in result.known})
    table = build(layout, found)
    assert table.columns == (("CIFAR-100", "0"), ("CIFAR-100", "200"), ("CIFAR-100", "600"), ("CIFAR-100", "1,000"))
    by_k = build(pivot(["method"], ["k"], ["k"]), found)
    assert by_k.columns == (("20",), ("200",))
    for rows, columns in ((["methd"], ["dataset"]), (["method"], ["method"]), ([], ["method"])):
        with pytest.raises(UserError):
            pivot(rows, columns, [])


def test_more_published_numbers_come_from_csv(tmp_path: Path) -> None:
    file = tmp_path / "more.csv"
    head = ",".join(COLUMNS)
    file.write_text(f"{head}\nOur lab,5,cifar10,moco,mixmask,knn,1000,,top1,91.5\n")
    more = read_published(file)
    table = build(layouts(more)["5"], [])
    assert the_cell(table, ("MixMask",), ("CIFAR-10", "MoCo", "kNN")).published == more[0]
    assert any(source.startswith("Our lab") for source in table.sources)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "no column source"),
        (f"{','.join(COLUMNS)}\npaper,5,c,m,v,knn,1000,,top1,many\n", "line 2: value is 'many'"),
        (f"{','.join(COLUMNS)}\npaper,5,c,m,v,knn,1000,,top1,nan\n", "line 2: value is 'nan'"),
        (f"{','.join(COLUMNS)}\npaper,5,,m,v,knn,1000,,top1,1\n", "line 2: dataset is empty"),
        (f"{','.join(COLUMNS)}\npaper,5\n", "line 2: 10 fields"),
        (f"{','.join(COLUMNS)}\nus,5,c,m,v,knn,1000,,acc,1\n", "line 2: metric is 'acc'; valid for knn: knn/top1"),
        (
            f"{','.join(COLUMNS)}\nus,5,c,m,v,svm,1000,,top1,1\n",
            "line 2: protocol is 'svm'; valid for table 5: knn, linear",
        ),
        ("", "no column source"),
        (f"{','.join(COLUMNS)}\n{'x' * 200_000},5,c,m,v,knn,1000,,top1,1\n", "not a readable CSV file"),
        (f'{",".join(COLUMNS)}\n"paper"x,5,c,m,v,knn,1000,,top1,1\n', "not a readable CSV file"),
    ],
)
def test_a_file_of_published_numbers_that_is_wrong_says_where(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "more.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        read_published(file)


def test_a_number_of_another_source_has_a_row_of_its_own_where_the_paper_has_one(tmp_path: Path) -> None:
    file = tmp_path / "more.csv"
    lines = [
        ",".join(COLUMNS),
        "Our lab,5,CIFAR-100,MoCo,MixMask,kNN,10,,top1,12.3",
        "Our lab,5,cifar100,moco,mscn,knn,1000,,top1,66.0",
    ]
    file.write_text("\n".join(lines))
    table = build(layouts(read_published(file))["5"], [])
    values = {row: cell.published.value for row, column, cell in cells(table) if column == CIFAR and cell.published}
    assert values[("MixMask",)] == 68.4
    assert values[("MixMask (Our lab)",)] == 12.3
    assert values[("MSCN",)] == 66.0
    assert ("a", "published by Our lab") in table.footnotes


def test_published_numbers_without_a_place_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "more.csv"
    file.write_text(f"{','.join(COLUMNS)}\nus,77,cifar100,moco,mixmask,knn,10,,top1,99.9\n")
    with pytest.raises(UserError, match="line 2: there is no table '77'; valid: 1, 2"):
        choose("5", read_published(file))


def test_a_pretraining_that_differs_in_more_than_the_mixture_takes_no_mark_away() -> None:
    both = [
        transfer(backbone(method=method, seed=seed), "knn", {"knn/top1": top1 + seed})
        for method, top1 in (("vanilla", 60.0), ("mixmask", 65.0))
        for seed in range(2)
    ]
    better = transfer(backbone(method="mixmask", batch_size=64), "knn", {"knn/top1": 70.0})
    assert numbers(table_of(both, "5")) <= numbers(table_of([*both, better], "5"))
    assert the_cell(table_of([*both, better], "5"), ("MixMask",), CIFAR).best


def test_no_winner_where_one_of_the_rivals_is_a_single_run() -> None:
    def runs(*seeds: int) -> list[Record]:
        return [
            transfer(backbone(method=method, seed=seed), "knn", {"knn/top1": top1 + seed})
            for method, top1, count in zip(("vanilla", "unmix", "mixmask"), (60.0, 62.0, 65.0), seeds, strict=True)
            for seed in range(count)
        ]

    def marked(records: list[Record]) -> list[str]:
        table = table_of(records, "5")
        return [row[0] for row, _, cell in cells(table) if cell.best or cell.near_best]

    assert marked(runs(2, 2, 2)) == ["MixMask"]
    assert marked(runs(1, 1, 1)) == marked(runs(3, 3, 1)) == marked(runs(1, 3, 3)) == []


def test_what_is_not_recorded_or_not_independent_is_said() -> None:
    bare = transfer(backbone(), "knn", {"knn/top1": 50.0}).model_copy(update={"settings": {}, "recipe": {}})
    assert "the transfer recipe is not recorded" in [text for _, text in table_of([bare], "5").footnotes]
    first, second = (
        backbone("imagenet1k", "mocov2", "mixmask", 200),
        backbone("imagenet1k", "mocov2", "mixmask", 200, seed=1),
    )
    runs = [transfer(first, "detect_voc", {"bbox/AP": 57.0 + seed}, seed=seed) for seed in range(4)]
    runs.append(transfer(second, "detect_voc", {"bbox/AP": 60.0}))
    texts = [text for _, text in table_of(runs, "7").footnotes]
    assert "5 runs on 2 backbones, which are not independent" in texts


def test_names_that_read_like_numbers_have_an_order() -> None:
    names = ["nan", "NaN x", "inf", "1e999", "3", "cifar"]
    records = [transfer(backbone(name), "knn", {"knn/top1": 5.0}) for name in names]
    one, two = table_of(records, "methods"), table_of(records[::-1], "methods")
    assert one.columns == two.columns
    assert [line.row for line in one.lines] == [line.row for line in two.lines]


def test_unknown_tables_are_refused() -> None:
    with pytest.raises(
        UserError,
        match="Valid: 1, 2, 3, 4, 5, semisup, 7, 7-2x, c4, code, fpn, fpn-2x, detectors, segmentation, solo, frozen, "
        "methods",
    ):
        choose("6", ())
    assert methods_by_protocols().id == "methods"
