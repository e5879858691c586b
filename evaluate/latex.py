"""A table for LaTeX (booktabs, pdfLaTeX)."""

from __future__ import annotations

from mixmask.engine.wording import printable
from mixmask.evaluate.table import Table, TableCell
from mixmask.evaluate.wording import MARKS, MISSING, cell_text, remarks

WIDE = 4  # more columns than this are shrunk to the width of the text
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
    "[": "{[}",  # after the end of a row these two would be taken for its options
    "*": "{*}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": r"$-$",
    "–": "--",
    "…": r"\dots{}",
}


def escape_latex(text: str) -> str:
    """For pdfLaTeX: what its fonts have not is written as its code point."""

    def one(letter: str) -> str:
        if letter in LATEX:
            return LATEX[letter]
        plain = letter.isascii() or (letter.isalpha() and "\u00c0" <= letter <= "\u00ff" and letter not in "ÐðÞþ")
        return letter if plain else f"{{[}}U+{ord(letter):04X}]"

    return "".join(map(one, printable(text)))


def latex(table: Table) -> str:
    """A ``table`` environment for a document that loads booktabs."""

    def style(text: str, cell: TableCell) -> str:
        return rf"\textbf{{{text}}}" if cell.best else rf"\underline{{{text}}}" if cell.near_best else text

    def heading(column: tuple[str, ...]) -> str:
        levels = [escape_latex(text) for text in column]
        stacked = r" \\ ".join(levels)
        return levels[0] if len(levels) == 1 else rf"\begin{{tabular}}{{@{{}}r@{{}}}}{stacked}\end{{tabular}}"

    body = []
    for line in table.lines:
        texts = [escape_latex(text) for text in line.row]
        if line.marks:
            texts[-1] += rf"\textsuperscript{{{','.join(line.marks)}}}"
        superscript = r"\textsuperscript{{{}}}"
        texts += [cell_text(cell, style, escape_latex, superscript).replace(MISSING, "--") for cell in line.cells]
        body.append("  " + " & ".join(texts) + r" \\")
    alignment = "l" * len(table.row_names) + "r" * len(table.columns)
    headings = [*map(escape_latex, table.row_names), *map(heading, table.columns)]
    foot = [rf"\textsuperscript{{{letter}}} {escape_latex(text)}" for letter, text in table.footnotes]
    legend = rf"\textbf{{{MARKS[0]}}}, \underline{{{escape_latex(MARKS[1])}}}."
    foot += [escape_latex(remark) if remark else legend for remark in remarks(table)]
    wide = len(table.columns) > WIDE
    origin = f" (table {table.id} of the paper)" if table.id.isdigit() else ""
    return "\n".join(
        [
            r"% needs \usepackage{booktabs,graphicx}" if wide else r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering\small",
            rf"  \caption{{{escape_latex(table.title + origin)}}}\label{{tab:{escape_latex(table.id)}}}",
            *([r"  \resizebox{\linewidth}{!}{%"] if wide else []),
            rf"  \begin{{tabular}}{{@{{}}{alignment}@{{}}}}",
            r"  \toprule",
            "  " + " & ".join(headings) + r" \\",
            r"  \midrule",
            *body,
            r"  \bottomrule",
            r"  \end{tabular}" + "}" * wide,
            "",
            r"  \raggedright\footnotesize",
            *(f"  {text} \\par" for text in foot),
            r"\end{table}",
            "",
        ]
    )
