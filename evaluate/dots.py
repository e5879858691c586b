"""What every protocol measured: a dot per backbone, every seed beside it, and a 95 % interval where there are seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from mixmask.evaluate.drawing import SMALL, TEXT, Plot, finished_plot, grouped, panels, short, style
from mixmask.evaluate.names import method_place, name
from mixmask.evaluate.results import Result, backbone_words, telling_keys
from mixmask.evaluate.statistics import summarize

MOST_ROWS = 30  # in one figure: more cannot be read


def protocol_dots(results: Sequence[Result]) -> list[Plot]:
    """A figure for each data set and way of measuring, with a panel for each headline metric."""
    plots = []
    measured = grouped(results, lambda r: (r.run.record.dataset, r.run.record.protocol, r.measurement))
    for (dataset, protocol, recipe), own in measured.items():
        rivals = [other for other in measured if other[:2] == (dataset, protocol)]
        record = own[0].run.record
        title = f"{name(dataset)}: {record.title}"
        id = f"dots-{dataset}-{protocol}"
        if len(rivals) > 1:
            firsts = [measured[key][0] for key in rivals]
            told = [f"{key} {own[0].known.get(key)}" for key in telling_keys(firsts) if "." not in key][:3]
            title, id = ", ".join([title, *told]), f"{id}-{recipe[:8]}"
        plots.append(_figure(id, title, own))
    return plots


def _figure(id: str, title: str, results: Sequence[Result]) -> Plot:
    metrics = [metric for metric in results[0].run.record.headlines if any(r.metric == metric for r in results)]
    rows = grouped(results, lambda r: r.pool[:5])
    order = sorted(rows.values(), key=lambda own: _order(own[0]))
    left_out = len(order) - MOST_ROWS
    shown = order[:MOST_ROWS]
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, axes = panels(columns, lines, height=max(1.5, 0.75 + 0.3 * len(shown)), full_width=True)
    labels = ["\n".join(textwrap.wrap(short(text, 60), 24 if columns > 1 else 40)) for text in _labels(shown)]
    for number, (panel, metric) in enumerate(zip(axes, metrics)):
        for place, own in enumerate(shown):
            _row(panel, -place, own[0].run.record.method, [r.value for r in own if r.metric == metric])
        panel.set_xlabel(f"{results[0].run.record.metric_name(metric)} (%)", fontsize=TEXT)
        first = number % columns == 0
        panel.set_yticks([-n for n in range(len(shown))], labels if first else [""] * len(shown), fontsize=SMALL)
        panel.set_ylim(-len(shown) + 0.4, 0.6)
        panel.margins(x=0.12)
    counts = sorted({len([r for r in own if r.metric == metrics[0]]) for own in shown})
    if counts == [1]:
        runs = f"Dots: single runs of {len(shown)} backbones; one run has no interval"
    else:
        several = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        bars = "; bars: 95 % t intervals over seeds" if counts[-1] > 2 else "; no intervals below three runs"
        runs = f"Dots: means of {several} runs, of {len(shown)} backbones; small dots: single runs{bars}"
    text = f"{runs}. The axes do not start at zero." + f" {left_out} more backbones are left out." * (left_out > 0)
    return finished_plot(id, title, figure, text, caption=text)


def _order(result: Result) -> tuple[object, ...]:
    record = result.run.record
    return method_place(record.method), record.framework, record.pretrain_epochs or 0.0, result.pool[:5]


def _row(panel: Axes, at: float, method: str, values: Sequence[float]) -> None:
    if not values:
        return
    colour, marker, _ = style(method)
    summary = summarize(values)
    half = summary.half_interval
    if len(values) > 1:
        panel.plot(values, [at - 0.22] * len(values), ".", color=colour, ms=3, alpha=0.6)
    error: dict[str, Any] = {} if half is None else {"xerr": [half]}
    panel.errorbar([summary.mean], [at], fmt=marker, color=colour, ms=5, capsize=2, lw=1.2, **error)
    # The number stands outside of the axes, where no bar can cover it.
    panel.text(1.02, at, f"{summary.mean:.1f}", transform=panel.get_yaxis_transform(), va="center", fontsize=SMALL)


def _labels(rows: Sequence[Sequence[Result]]) -> list[str]:
    """The backbone of each row, and what distinguishes it where two would read alike."""
    plain = [backbone_words(own[0].run.record) for own in rows]
    found = []
    for text, own in zip(plain, rows, strict=True):
        alike = [other[0] for other, same in zip(rows, plain, strict=True) if same == text]
        told = [f"{key.removeprefix('mix.')} {own[0].known.get(key)}" for key in telling_keys(alike)][:2]
        found.append(", ".join([text, *told]) if len(alike) > 1 else text)
    return found
