"""Render tables as Markdown, HTML and LaTeX, with the Jinja templates in ``evaluate/templates``.

To change the layout, give a folder with templates of the same names: they are used instead of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from mixmask.engine.errors import UserError
from mixmask.engine.wording import printable
from mixmask.evaluate.compact import Compact, compact
from mixmask.evaluate.escaping import escape_html, escape_latex, escape_markdown
from mixmask.evaluate.table import MISSING, Table, TableCell
from mixmask.evaluate.wording import MARKS, heading, numbers, remarks

Templated = Literal["md", "html", "latex"]
FILES: dict[Templated, str] = {"md": "table.md.j2", "html": "table.html.j2", "latex": "table.tex.j2"}
ESCAPES: dict[str, Callable[[str], str]] = {"md": escape_markdown, "html": escape_html, "latex": escape_latex}


def _unlinked(cell: TableCell, text: str) -> str:
    return text


def templated(
    table: Table,
    form: Templated,
    templates: Path | None = None,
    link: Callable[[TableCell, str], str] = _unlinked,
) -> str:
    """The table through its template.

    Args:
        table: What to show.
        form: Which template.
        templates: A folder whose templates are used instead of ours.
        link: For HTML: turns a cell and its text into the text with its link.

    Raises:
        UserError: If the folder's template is broken; the message names the file and, for syntax errors, the line.
    """
    try:
        return _environment(form, templates).get_template(FILES[form]).render(**_values(compact(table), link))
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:  # what a template does
        if templates is None:
            raise
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"{templates / FILES[form]}{line}: {printable(str(error))}") from None


@cache
def _environment(form: Templated, templates: Path | None) -> jinja2.Environment:
    own = [] if templates is None else [jinja2.FileSystemLoader(templates)]
    loaders = [*own, jinja2.PackageLoader("mixmask.evaluate", "templates")]
    # LaTeX is full of braces, so its templates have other delimiters.
    latex: dict[str, Any] = {
        "variable_start_string": "((",
        "variable_end_string": "))",
        "block_start_string": "<%",
        "block_end_string": "%>",
        "comment_start_string": "{#",
        "comment_end_string": "#}",
    }
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=False,  # every text goes through the filter `t`, which knows the format
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        **(latex if form == "latex" else {}),
    )
    environment.filters["t"] = lambda text: ESCAPES[form](str(text))
    return environment


def _values(shown: Compact, link: Callable[[TableCell, str], str]) -> dict[str, Any]:
    """The variables of a template."""
    table, counted = shown.table, shown.num_runs is None
    return {
        "id": table.id,
        "title": table.title,
        "heading": heading(table),
        "constants": shown.caption,
        "num_runs": shown.num_runs,
        "groups": shown.groups,
        "row_names": table.row_names,
        "columns": table.columns,
        "lines": [
            {
                "row": line.row,
                "marks": line.marks,
                "cells": [None if one is None else _cell(one, counted) for one in line.cells],
            }
            for line in table.lines
        ],
        "footnotes": table.footnotes,
        "remarks": remarks(table, shown.num_runs),
        "missing": MISSING,
        "marked_best": MARKS[0],
        "marked_near": MARKS[1],
        "link": lambda cell, text: link(cell, str(text)),
    }


def _cell(cell: TableCell, counted: bool) -> dict[str, Any]:
    own, published = numbers(cell, counted)
    summary = cell.summary
    return {
        "own": own,
        "published": published,
        "best": cell.best,
        "near_best": cell.near_best,
        "marks": cell.marks,
        "order": summary.mean if summary else "",
        "where": cell.published.where if cell.published else "",
        "cell": cell,
    }


def html_table(
    table: Table, link: Callable[[TableCell, str], str] = _unlinked, templates: Path | None = None
) -> Markup:
    """A ``<table>`` with its caption and footnotes."""
    return Markup(templated(table, "html", templates, link))
