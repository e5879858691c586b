"""Figures that colour-blind readers can read, too."""

from __future__ import annotations

import io
import textwrap
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from mixmask.engine.storage import require_own_file, write_atomic

CREATOR = "mixmask plots"  # in the metadata of every file, so that only our own files are replaced

Form = Literal["png", "svg", "pdf"]
METADATA: dict[Form, dict[str, str | None]] = {
    "png": {"Software": CREATOR},
    "svg": {"Date": None, "Creator": CREATOR},
    "pdf": {"CreationDate": None, "Creator": CREATOR},
}
# Inches of a column and of a page's text in a two-column paper, and points: printed at that size, all text can be read.
COLUMN, WIDE = 3.4, 6.9
SMALL, TEXT, TITLE = 8.0, 8.5, 9.5

# Okabe and Ito's palette, with a marker and a line style for each: nothing is shown by colour alone.
STYLES: dict[str, tuple[str, str, str]] = {
    "random": ("#3a3a3a", "x", ":"),
    "vanilla": ("#0072b2", "o", "-"),
    "mscn": ("#e69f00", "v", "-."),
    "unmix": ("#009e73", "s", "--"),
    "mixmask": ("#d55e00", "D", "-"),
    "mixmask+unmix": ("#cc79a7", "^", "--"),
    "unknown": ("#56b4e9", "P", ":"),
}
OTHERS = (
    ("#882255", "<", "--"),
    ("#117733", ">", "-."),
    ("#332288", "*", "-"),
    ("#999933", "h", "--"),
    ("#aa4499", "d", "-."),
)


def style(method: str) -> tuple[str, str, str]:
    """Colour, marker and line style of a method; for a method of your own, a hash of its name picks one of `OTHERS`."""
    if method in STYLES:
        return STYLES[method]
    # Not hash(), which differs between Python processes.
    number = zlib.crc32(method.encode("utf-8", "replace"))
    return OTHERS[number % len(OTHERS)]


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure, its file name without suffix, its title, and an alternative text."""

    id: str
    title: str
    figure: Figure
    text: str
    caption: str = ""  # shown below the figure where there is room

    def render(self, form: Form) -> bytes:
        """The content of an image file; the same runs give the same bytes."""
        buffer = io.BytesIO()
        # Text stays text: SVG keeps its letters, PDF gets TrueType fonts, which journals ask for.
        with matplotlib.rc_context({"svg.hashsalt": self.id, "svg.fonttype": "none", "pdf.fonttype": 42}):
            self.figure.savefig(
                buffer,
                format=form,
                dpi=150,
                metadata=METADATA[form],
                bbox_inches="tight",
            )
        return buffer.getvalue()


def write_plots(plots: Sequence[Plot], folder: Path, force: bool = False) -> list[Path]:
    """Every plot as PNG, SVG and PDF; older ones of this project are replaced.

    Raises:
        UserError: If a file of that name is none of this project's and ``force`` is not given.
    """
    for plot in plots:
        for form in METADATA:
            require_own_file(folder / f"{plot.id}.{form}", CREATOR.encode(), force)
    written = []
    for plot in plots:
        for form in METADATA:
            payload = plot.render(form)
            path = folder / f"{plot.id}.{form}"
            write_atomic(path, partial(_write, payload))
            written.append(path)
    return written


def _write(payload: bytes, file: BinaryIO) -> None:
    file.write(payload)


def panels(columns: int, rows: int, height: float = 2.6, full_width: bool = False) -> tuple[Figure, list[Axes]]:
    """A grid of equal panels, as wide as a column or a page of a paper; ``height`` holds for one row, in inches."""
    figure = Figure(figsize=(WIDE if full_width or columns > 1 else COLUMN, height * rows), layout="constrained")
    axes = [panel for line in figure.subplots(rows, columns, squeeze=False) for panel in line]
    for panel in axes:
        panel.grid(alpha=0.3, lw=0.5)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=SMALL)
    return figure, axes


def errorbars(panel: Axes, points: Sequence[tuple[Any, float, float, int]], method: str, label: str) -> None:
    """A method's line: x, mean, sample standard deviation (NaN for one run) and number of runs of each point.

    A further line of the same method in a panel gets hollow markers and another dash.
    """
    colour, marker, dash = style(method)
    lines = [one.lines[0] for one in panel.containers if isinstance(one, ErrorbarContainer)]
    before = sum(line.get_color() == colour for line in lines)
    if before:
        dash = (":", "-.", "--")[(before - 1) % 3]
    panel.errorbar(
        [at for at, *_ in points],
        [mean for _, mean, *_ in points],
        yerr=[std for _, _, std, _ in points],
        fmt=marker + dash,
        color=colour,
        markerfacecolor="white" if before else colour,
        capsize=2,
        ms=5,
        lw=1.3,
        label=short(label, 60),
    )


def legend(figure: Figure, *axes: Axes) -> None:
    """One legend under the figure, each label once; panels without a line go."""
    entries: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for panel in figure.axes:
        if not panel.has_data():
            panel.set_visible(False)
    if entries:
        figure.legend(
            [*entries.values()],
            [*entries],
            loc="outside lower center",
            ncols=1 if figure.get_figwidth() < WIDE else 2,
            fontsize=SMALL,
            frameon=False,
        )


def finished_plot(id: str, title: str, figure: Figure, text: str, caption: str = "") -> Plot:
    """Set the title, fix the layout, and make the id safe as a file name."""
    lines = textwrap.wrap(short(title, 120), round(figure.get_figwidth() * 12.5))
    figure.suptitle("\n".join(lines), fontsize=TITLE)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, so that every file of it is the same
    safe = "".join(one if one.isascii() and (one.isalnum() or one in "-_.") else "-" for one in id)
    return Plot(safe[:80], title, figure, text, caption)


def short(text: str, most: int) -> str:
    """Cut a text to ``most`` characters, with an ellipsis at the end."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def grouped(items: Any, key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """By a key, in the order of the keys."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(sorted(groups.items(), key=lambda pair: repr(pair[0])))
