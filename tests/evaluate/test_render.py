"""Names that are markup in one format or another come out as themselves in each of them."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmask.engine.errors import UserError
from mixmask.engine.records import Record
from mixmask.engine.wording import printable
from mixmask.evaluate.collect import Run
from mixmask.evaluate.layouts import choose, methods_by_protocols
from mixmask.evaluate.names import NAMES
from mixmask.evaluate.render import form_of, render, render_all
from mixmask.evaluate.results import results_of
from mixmask.evaluate.spreadsheet import safe_cell
from mixmask.evaluate.table import Table, build
from tests.evaluate.made import backbone, laboratory, transfer
from tests.evaluate.test_tables import CIFAR, IDS, cells, table_of, the_cell
from tests.needs import need

HOSTILE = (
    "<script>alert(1)</script>",
    "a|b\\|c",
    r"\input{/etc/passwd} $x_1^2$ % & # ~ {",
    "**bold** _it_ `code` [link](http://x) ![i](y) <b>",
    "quote \" and ' and ,;\n next line\r\n\ttab",
    "\x1b[31mred\x1b[0m \x00 \u202etxt.exe",
    "名前 ñandú Ångström 🙂 é ﬁ ß",
    "=HYPERLINK(1)",
    "&lt;tag&gt; &amp;",
    "x" * 400,
    "]]> -->",
    "[5cm] starts as an option",
    "*starred",
    "- # > not a list",
)


def hostile(framework: str) -> Record:
    record = transfer(backbone(), "knn", {"knn/top1": 50.0})
    return record.model_copy(
        update={
            "framework": framework,
            "dataset": framework,
            "arch": framework,
            "lineage": framework,
            "pretrain_dataset": framework,
        }
    )


def hostile_table(*names: str) -> Table:
    runs = [Run(Path("r"), hostile(name).model_copy(update={"fingerprint": str(n)})) for n, name in enumerate(names)]
    return build(methods_by_protocols(), results_of(runs))


class Cells(HTMLParser):
    """The texts of a table's rows, and every tag that was met."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def check_html(name: str) -> None:
    cells = Cells()
    cells.feed(render(hostile_table(name), "html"))
    assert cells.tags <= {
        "div",
        "figure",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "br",
        "sup",
        "figcaption",
        "p",
    }
    assert cells.rows[2][1] == printable(name)
    assert printable(name) in cells.rows[0][-1]


def check_csv(name: str) -> None:
    rows = list(csv.DictReader(io.StringIO(render(hostile_table(name), "csv"))))
    assert len(rows) == 1
    assert rows[0]["row"].split(" / ")[1:2] == [printable(name)] or " / " in name
    assert rows[0]["column"] == safe_cell(f"{printable(name)} / kNN top-1")
    assert not rows[0]["column"].startswith(("=", "+", "-", "@"))


def split_markdown(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def unescape_markdown(text: str) -> str:
    assert "://" not in text
    assert "@" not in text
    plain = re.sub(r"\\([\\`*_|~$\[\]])", r"\1", text)
    for code, sign in (("&#47;", "/"), ("&#46;", "."), ("&#64;", "@")):
        plain = plain.replace(code, sign)
    return plain.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def check_markdown(name: str) -> None:
    text = render(hostile_table(name), "md")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    row = split_markdown(lines[2])
    assert len(row) == len(split_markdown(lines[0])) == 6
    assert unescape_markdown(row[1]) == printable(name).strip()
    assert "<script" not in text


def check_term(name: str) -> None:
    text = render(hostile_table(name), "term", width=100)
    assert "\x1b" not in text
    assert "50.0" in text
    squeezed = re.sub(r"\s", "", text)
    assert re.sub(r"\s", "", printable(name))[:6] in squeezed


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_in_text_formats(name: str) -> None:
    for check in (check_html, check_csv, check_markdown, check_term):
        check(name)


def is_unknown(text: str) -> bool:
    """A name that is shown as it is: not empty, and none that the paper writes in another way."""
    return bool(text.strip()) and text not in NAMES


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(is_unknown))
def test_any_name_in_text_formats(name: str) -> None:
    for check in (check_html, check_csv, check_markdown):
        check(name)


def check_latex_structure(text: str) -> None:
    """Balanced braces and environments, and as many cells as columns in every row; escaped characters left aside."""
    plain = re.sub(r"\\[{}$&#%_\\]", "", text)
    assert plain.count("{") == plain.count("}")
    assert re.findall(r"\\begin\{(\w+)\}", text).count("table") == text.count(r"\end{table}") == 1
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    alignment = re.search(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", text)
    assert alignment is not None
    for row in body.strip().splitlines():
        assert row.rstrip().endswith(r"\\")
        assert len(re.findall(r"(?<!\\)&", row)) == len(alignment[1]) - 1
    assert all(ord(letter) < 256 for letter in text)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_in_latex(name: str) -> None:
    check_latex_structure(render(hostile_table(name), "latex"))


def has_tex() -> bool:
    return shutil.which("pdflatex") is not None and bool(
        subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, text=True, check=False).stdout
    )


@pytest.mark.real
def test_latex_compiles(tmp_path: Path) -> None:
    """Every table, and one with every hostile name, in one document."""
    need(
        has_tex(),
        "pdflatex with booktabs",
        "apt-get install texlive-latex-base texlive-latex-recommended",
        "MIXMASK_REQUIRE_TEX",
    )
    tables = [table_of(laboratory(), id) for id in IDS] + [hostile_table(*HOSTILE)]
    text = render_all(tables, "latex")
    document = (
        "\\documentclass{article}\\usepackage[paperwidth=200cm,paperheight=60cm]{geometry}\\usepackage{booktabs,graphicx}\n"
        f"\\begin{{document}}\n{text}\n\\end{{document}}\n"
    )
    (tmp_path / "tables.tex").write_text(document, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-no-shell-escape", "-interaction=nonstopmode", "tables.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000
    assert "Missing character" not in done.stdout


def test_the_terminal_gets_columns_side_by_side_only_where_they_fit() -> None:
    table = table_of(laboratory(), "7")
    for width in (60, 80, 120, 200):
        text = render(table, "term", width=width)
        assert all(len(line) <= width for line in text.splitlines())
        assert text.count("57.8 ± 0.2 (5)") == 1


@pytest.mark.parametrize("id", ["1", "7", "methods"])
@pytest.mark.parametrize("width", [60, 80])
def test_no_heading_is_broken_inside_a_word_on_a_narrow_terminal(id: str, width: int) -> None:
    table = table_of(laboratory(), id)
    text = render(table, "term", width=width)
    for words in (*table.row_names, *(part for column in table.columns for part in column)):
        assert all(word in text for word in words.split()), words


def test_formats_follow_suffixes() -> None:
    assert [form_of(suffix) for suffix in (".md", ".tex", ".csv", ".html")] == ["md", "latex", "csv", "html"]
    with pytest.raises(UserError, match=r"'\.docx'.*valid: \.md, \.tex"):
        form_of(".docx")


def test_a_template_of_ones_own_comes_before_ours(tmp_path: Path) -> None:
    table = build(choose("5", ())[0], [])
    good, broken, absent = (tmp_path / name for name in ("good", "broken", "absent"))
    for folder, file, text in (
        (good, "table.md.j2", "{{ title | t }}: {{ lines | length }} lines\n"),
        (broken, "table.md.j2", "one\n{% for %}"),
        (absent, "table.tex.j2", "(( absent ))"),
    ):
        folder.mkdir()
        (folder / file).write_text(text)
    assert render(table, "md", templates=good) == f"{table.title}: {len(table.lines)} lines\n"
    assert render(table, "latex", templates=good) == render(table, "latex")
    with pytest.raises(UserError, match=r"table\.md\.j2, line 2: "):
        render(table, "md", templates=broken)
    with pytest.raises(UserError, match=r"table\.tex\.j2: 'absent' is undefined"):
        render(table, "latex", templates=absent)


def test_csv_holds_every_cell_in_full_precision() -> None:
    table = table_of(laboratory(), "5")
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert len(rows) == len([cell for _, _, cell in cells(table) if cell.results or cell.published])
    vanilla = next(row for row in rows if row["row"] == "Vanilla" and row["n"] == "5")
    cell = the_cell(table, ("Vanilla",), CIFAR)
    assert cell.summary is not None
    assert float(vanilla["mean"]) == cell.summary.mean
    assert float(vanilla["std"]) == cell.summary.std
    assert len(vanilla["runs"].split()) == 5
    assert vanilla["source"].endswith("table 5")
