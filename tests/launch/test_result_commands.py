"""The commands that read finished runs, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from mixmask.engine.errors import UserError
from mixmask.engine.expected import Expectation
from mixmask.launch.commands.app import app
from tests.evaluate.made import backbone, laboratory, transfer, write


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(laboratory(), tmp_path_factory.mktemp("lab"))


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def refused(*arguments: object) -> str:
    """The message of a user's mistake, for which `launch.cli.main` exits with 2 and without a traceback."""
    with pytest.raises(UserError) as caught:
        run(*arguments)
    return str(caught.value)


def test_results_in_every_format(lab: Path, tmp_path: Path) -> None:
    code, out, _ = run("results", lab, "--query", "dataset == 'cifar100' and protocol == 'knn'", "--format", "json")
    rows = json.loads(out)
    assert code == 0
    assert {row["dataset"] for row in rows} == {"cifar100"}
    code, out, _ = run("results", lab)
    assert out.splitlines()[0].startswith("run,stage,protocol,name,dataset")
    assert len(out.splitlines()) == 1 + len(laboratory())
    file = tmp_path / "r.parquet"
    assert run("results", lab, "--out", file)[1].strip() == str(file)
    assert len(pd.read_parquet(file)) == len(laboratory())
    assert "mix.grid: MixMask: cells per side" in run("results", lab, "--columns")[1]
    code, out, error = run("results", lab, "--query", "seed == 99")
    assert (code, len(out.splitlines())) == (0, 1)
    assert "no run" in error


def test_tables_by_name_by_format_and_by_suffix(lab: Path, tmp_path: Path) -> None:
    every = run("tables", lab)[1]
    for heading in ("Table 1:", "Table 5:", "Table 7:", "Methods × protocols"):
        assert heading in every
    assert "Table 3" in run("tables", lab, "--table", "3")[1]
    file = tmp_path / "seven.tex"
    assert run("tables", lab, "--table", "7", "--out", file)[0] == 0
    assert r"\toprule" in file.read_text()
    own = run(
        "tables", lab, "--rows", "method", "--cols", "pretrain_epochs", "--metric", "knn/top1", "--format", "csv"
    )[1]
    assert "pivot,MixMask,600,67.5," in own
    only = run("tables", lab, "--table", "5", "--query", "seed == 0 and pretrain_epochs == 200", "--format", "csv")[1]
    assert ",63.5,,1," in only
    assert "has a place in table 3" in run("tables", lab, "--table", "3", "--query", "method == 'vanilla'")[2]


def test_more_published_numbers(lab: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.csv"
    head = "source,table,dataset,framework,method,protocol,pretrain_epochs,setting,metric,value"
    more.write_text(f"{head}\nOur own,5,cifar100,mocov2,vanilla,linear,200,,top1,66.6\n")
    assert "[66.6]" in run("tables", lab, "--table", "5", "--published", more)[1]


@pytest.mark.slow
def test_compare_verify_plots_report_card(lab: Path, tmp_path: Path) -> None:
    code, out, _ = run("compare", "mixmask", "vanilla", "--runs", lab, "--metric", "bbox/AP")
    assert code == 0
    assert any("VOC 2007" in line and "5 seeds, 95 % CI [" in line for line in out.splitlines())
    assert run("plots", lab, "--out", tmp_path / "plots")[0] == 0
    assert list((tmp_path / "plots").glob("*.svg"))
    assert run("report", lab, "--out", tmp_path / "report")[1].strip() == str(tmp_path / "report" / "index.html")
    folder = next((lab / "pretrain").glob("imagenet1k-*-mixmask-*"))
    assert run("card", folder, "--license", "mit", "--out", tmp_path / "README.md")[0] == 0
    assert (tmp_path / "README.md").read_text().startswith("---\nlicense: mit\n")


def test_verify_tells_by_its_exit_code(tmp_path: Path) -> None:
    expected = Expectation(metric="knn/top1", value=68.4, tolerance=0.5, source="table 5")
    record = backbone().model_copy(update={"expected": (expected,)})
    write([record], tmp_path)
    code, out, _ = run("verify", tmp_path)
    assert (code, out.splitlines()[-1]) == (0, "0 reproduced, 0 not reproduced, 1 not measured yet")
    write([transfer(record, "knn", {"knn/top1": 68.6})], tmp_path)
    code, out, _ = run("verify", tmp_path)
    assert (code, out.splitlines()[-1]) == (0, "1 reproduced, 0 not reproduced, 0 not measured yet")
    write([transfer(record, "knn", {"knn/top1": 60.0}, seed=1)], tmp_path)
    code, out, _ = run("verify", tmp_path)
    assert (code, out.splitlines()[-1]) == (1, "1 reproduced, 1 not reproduced, 0 not measured yet")
    assert "NOT REPRODUCED" in out


def test_the_tables_are_listed(lab: Path) -> None:
    code, out, _ = run("tables", lab, "--table", "list")
    assert code == 0
    assert out.splitlines()[0].split() == [
        "1",
        "Masks",
        "of",
        "MixMask:",
        "grid",
        "size,",
        "strategy,",
        "ratio,",
        "switch",
        "image",
    ]
    assert out.splitlines()[-1].startswith("methods ")


def test_mistakes_are_answered_and_nothing_is_written(lab: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, arguments in (
        ("no such folder", ("tables", tmp_path / "absent")),
        ("no record.json in it", ("report", empty, "--out", tmp_path / "r")),
        ("no record.json in it", ("results", empty)),
        ("is a file", ("tables", file)),
        ("is a file and not a folder", ("report", lab, "--out", file)),
        ("is a file and not a folder", ("plots", lab, "--out", file)),
        ("is a file and not a folder", ("tables", lab, "--out", file / "t.md")),
        ("is a folder", ("results", lab, "--out", tmp_path)),
        ("there is no column 'nonsense'", ("results", lab, "--query", "nonsense == 1")),
        ("mixmask results RUNS --columns", ("tables", lab, "--query", "nonsense == 1")),
        ("no such table. Valid: 1, 2", ("tables", lab, "--table", "6")),
        ("no such dimension. Valid: dataset", ("tables", lab, "--rows", "methd", "--cols", "dataset")),
        ("no transfer run has it; there are bbox/AP", ("tables", lab, "--rows", "seed", "--cols", "k", "--metric", "x")),
        ("give --rows and --cols together", ("tables", lab, "--rows", "method")),
        ("give one or the other", ("tables", lab, "--rows", "method", "--cols", "dataset", "--table", "1")),
        ("no table format has this suffix", ("tables", lab, "--out", tmp_path / "t.docx")),
        ("no format has the suffix '.xlsx'", ("results", lab, "--out", tmp_path / "r.xlsx")),
        ("write it to a file with --out results.parquet", ("results", lab, "--format", "parquet")),
        ("no column source", ("tables", lab, "--published", file)),
        ("absent.csv: cannot be read (No such file", ("tables", lab, "--published", tmp_path / "absent.csv")),
        ("expects anything", ("verify", lab)),
        ("methods there", ("compare", "mscn", "vanilla", "--runs", lab)),
        ("nothing to compare", ("compare", "protocol == 'linear'", "protocol == 'knn'", "--runs", lab)),
        ("no record.json", ("card", lab)),
    ):  # fmt: skip
        assert words in refused(*arguments), arguments
    assert file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_what_was_left_out_is_said_beside_the_result(tmp_path: Path) -> None:
    runs = write([transfer(backbone(), "knn", {"knn/top1": 50.0})], tmp_path / "runs")
    (runs / "half").mkdir()
    (runs / "half" / "record.json").write_text('{"schema": 2')
    (runs / "going").mkdir()
    (runs / "going" / "recipe.yaml").write_text("")
    code, out, error = run("tables", runs)
    assert code == 0
    assert "50.0" in out
    assert f"left out {runs / 'half' / 'record.json'}: truncated" in error
    assert f"unfinished: {runs / 'going'}" in error
