"""Escape plain text for Markdown, HTML and LaTeX, so that nothing in it acts as markup."""

from __future__ import annotations

import html
import re

from mixmask.engine.wording import printable

LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",  # after the end of a row, LaTeX takes this and * for its options
    "*": "{*}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": r"$-$",
    "–": "--",
    "…": r"\dots{}",
}


def escape_markdown(text: str) -> str:
    """Escape text for a Markdown line or table cell."""
    escaped = html.escape(printable(text), quote=False)
    escaped = re.sub(r"([\\`*_|~$\[\]])", r"\\\1", escaped)
    for link, code in (
        ("://", ":&#47;&#47;"),
        ("www.", "www&#46;"),
        ("@", "&#64;"),
    ):  # many renderers link bare addresses
        escaped = re.sub(re.escape(link), code, escaped, flags=re.IGNORECASE)
    return escaped


def escape_html(text: str) -> str:
    """Escape text for HTML content and attribute values."""
    return html.escape(printable(text))


def escape_latex(text: str) -> str:
    """Escape text for pdfLaTeX; a character that its fonts lack is written as its code point, ``[U+4E2D]``."""

    def one(letter: str) -> str:
        if letter in LATEX:
            return LATEX[letter]
        plain = letter.isascii() or (letter.isalpha() and "\u00c0" <= letter <= "\u00ff" and letter not in "ÐðÞþ")
        return letter if plain else f"{{[}}U+{ord(letter):04X}]"

    return "".join(map(one, printable(text)))
