"""Tables as text: for the terminal (rich), as CSV, and through templates as Markdown, LaTeX and HTML."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from pathlib import Path
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from mixmask.engine.errors import UserError
from mixmask.engine.wording import printable
from mixmask.evaluate.compact import compact
from mixmask.evaluate.spreadsheet import safe_cell
from mixmask.evaluate.table import MISSING, Table, TableCell
from mixmask.evaluate.templating import templated
from mixmask.evaluate.wording import MARKS, heading, numbers, remarks

TableFormat = Literal["term", "md", "latex", "csv", "html"]
SUFFIXES: dict[str, TableFormat] = {".md": "md", ".tex": "latex", ".csv": "csv", ".html": "html", ".txt": "term"}

GAP = 3  # characters that rich adds to a column: padding on both sides and a blank between columns


def form_of(path_suffix: str) -> TableFormat:
    """The format that a file's suffix asks for.

    Raises:
        UserError: If no format has this suffix.
    """
    if path_suffix not in SUFFIXES:
        raise UserError(
            f"'{path_suffix}': no table format has this suffix; valid: {', '.join(SUFFIXES)}, or give --format"
        )
    return SUFFIXES[path_suffix]


def render(table: Table, form: TableFormat, width: int | None = None, templates: Path | None = None) -> str:
    """The table in a format, ending in a newline.

    Args:
        table: What to show.
        form: CSV has one line per cell, in full precision; the others are laid out.
        width: The terminal's width in characters; None asks the terminal.
        templates: A folder of templates for Markdown, LaTeX and HTML that are used instead of ours.
    """
    if form == "term":
        return _term(table, width)
    return _csv(table) if form == "csv" else templated(table, form, templates)


def render_all(tables: list[Table], form: TableFormat, width: int | None = None, templates: Path | None = None) -> str:
    """Several tables, one after another; as CSV they have one header."""
    if form == "csv":
        return _csv(*tables)
    return "\n".join(render(table, form, width, templates) for table in tables)


def _stub(table: Table) -> list[list[str]]:
    """The row's texts of each line."""
    return [[printable(text) for text in line.row] for line in table.lines]


def _headings(table: Table, between: str) -> list[str]:
    return [between.join(printable(text) for text in column) for column in table.columns]


# --- terminal --------------------------------------------------------------------------------------------------------


def _term(whole: Table, width: int | None) -> str:
    small = compact(whole)
    table = small.table

    def shown_cell(cell: TableCell | None) -> Text:
        if cell is None:
            return Text("")
        own, published = numbers(cell, counted=small.num_runs is None)
        text = Text()
        if own:
            mark = "*" if cell.best else "~" if cell.near_best else ""
            text.append(own + mark, style="bold green" if cell.best else "green" if cell.near_best else "")
        else:
            text.append(MISSING)
        if cell.marks:
            text.append(f" {','.join(cell.marks)}", style="cyan")
        if published:
            text.append(f"\n{published}", style="dim")
        return text

    stub_names = [*table.row_names, *([""] if any(line.marks for line in table.lines) else [])]
    stubs = [
        [*map(Text, stub), Text(",".join(line.marks), style="cyan")] for line, stub in zip(table.lines, _stub(table))
    ]
    headings = [Text("\n".join(map(printable, column))) for column in table.columns]
    cells = [[shown_cell(cell) for cell in line.cells] for line in table.lines]
    limit = width or shutil.get_terminal_size((200, 24)).columns
    widths = [max(map(_width, [headings[n], *(row[n] for row in cells)])) for n in range(len(headings))]
    stub_widths = [
        max(map(_width, [Text(printable(name)), *(stub[n] for stub in stubs)])) for n, name in enumerate(stub_names)
    ]
    # Row labels may take half of the width, or all that the widest column leaves.
    most = max(limit // 2, limit - max(widths, default=0) - GAP)
    if sum(stub_widths) + GAP * len(stub_widths) > most:  # then the row labels become one column, which wraps
        stub_names = [" · ".join(filter(None, stub_names))]
        stubs = [[Text(" · ").join(text for text in stub if text)] for stub in stubs]
        stub_widths = [min(most - GAP, max(map(_width, [Text(stub_names[0]), *(stub[0] for stub in stubs)])))]
    room = limit - sum(stub_widths) - GAP * len(stub_widths)
    widths = [max(min(one, room - GAP), 1) for one in widths]
    buffer = io.StringIO()
    colour = sys.stdout.isatty()
    console = Console(file=buffer, width=limit, force_terminal=colour, no_color=not colour, highlight=False)
    console.print(Text(heading(table), style="bold"))
    if small.caption:
        console.print(Text(printable(small.caption)))
    for number, block in enumerate(_blocks(widths, room)):
        if number:
            console.print()
        shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name, one in zip(stub_names, stub_widths, strict=True):
            shown.add_column(Text(printable(name)), overflow="fold", width=one)
        for n in block:
            shown.add_column(headings[n], justify="right", overflow="fold", width=widths[n])
        for stub, row in zip(stubs, cells, strict=True):
            if any(row[n].plain for n in block):
                shown.add_row(*stub[: len(stub_names)], *(row[n] for n in block))
        console.print(shown)
    legend = f"* {MARKS[0]}, ~ {MARKS[1]}"
    said = [remark or legend for remark in remarks(table, small.num_runs)]
    for letter, text in table.footnotes:
        console.print(Text(f"{letter}  {printable(text)}"))
    for remark in said:
        console.print(Text(remark, style="dim"))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _width(text: Text) -> int:
    return max(map(cell_len, text.plain.splitlines()), default=0)


def _blocks(widths: list[int], room: int) -> list[list[int]]:
    """Split the columns into blocks that fit into ``room``; each block is printed as a table below the last."""
    blocks: list[list[int]] = [[]]
    used = 0
    for number, width in enumerate(widths):
        if blocks[-1] and used + width + GAP > room:
            blocks.append([])
            used = 0
        blocks[-1].append(number)
        used += width + GAP
    return blocks


# --- CSV -------------------------------------------------------------------------------------------------------------

CSV_COLUMNS = (
    "table",
    "row",
    "column",
    "mean",
    "std",
    "n",
    "published",
    "difference",
    "best",
    "within_noise",
    "footnotes",
    "source",
    "runs",
)


def _csv(*tables: Table) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in tables:
        texts = dict(table.footnotes)
        for line, stub in zip(table.lines, _stub(table), strict=True):
            for column, cell in zip(_headings(table, " / "), line.cells, strict=True):
                if cell is None or not (cell.results or cell.published):
                    continue
                summary, number = cell.summary, cell.published
                writer.writerow(
                    safe_cell(value)
                    for value in (
                        table.id,
                        " / ".join(stub),
                        column,
                        *(
                            (summary.mean, "" if summary.std is None else summary.std, summary.n)
                            if summary
                            else ("",) * 3
                        ),
                        "" if number is None else number.value,
                        "" if cell.difference is None else round(cell.difference, 10),
                        int(cell.best),
                        int(cell.near_best),
                        "; ".join(printable(texts[mark]) for mark in (*line.marks, *cell.marks)),
                        "" if number is None else number.where,
                        " ".join(result.run.record.fingerprint for result in cell.results),
                    )
                )
    return buffer.getvalue()
