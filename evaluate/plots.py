"""Plots of finished runs, for people who cannot tell some colours apart, too."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
from matplotlib.ticker import FixedLocator, NullLocator

from mixmask.evaluate.collect import Run
from mixmask.evaluate.curves import training_curves
from mixmask.evaluate.dots import protocol_dots
from mixmask.evaluate.drawing import SMALL, TEXT, Plot, errorbars, finished_plot, grouped, legend, panels, short, style
from mixmask.evaluate.names import method_place, name
from mixmask.evaluate.published import Published
from mixmask.evaluate.reference import departures, stated
from mixmask.evaluate.results import Result, backbone_words, results_of, telling_keys
from mixmask.evaluate.statistics import summarize


def plots_of(runs: Sequence[Run], published: Sequence[Published] = ()) -> list[Plot]:
    """Every plot for which there are numbers.

    Args:
        runs: Finished runs.
        published: Numbers to show beside the runs' own, in ablations.
    """
    results = results_of(runs)
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
        plots = [
            *training_curves(runs),
            *budgets(results),
            *ablations(results, published),
            *protocol_dots(results),
            *label_efficiency(results),
            *throughput(runs),
        ]
    seen: Counter[str] = Counter()
    unique = []
    for plot in plots:
        seen[plot.id] += 1
        unique.append(plot if seen[plot.id] == 1 else replace(plot, id=f"{plot.id}-{seen[plot.id]}"))
    return unique


# --- accuracies ------------------------------------------------------------------------------------------------------


def _is_faithful(result: Result, varied: str, number: Published) -> bool:
    """Whether a result was made as a published number was, but for what is varied."""
    usual = stated(result.dims)
    return bool(usual) and not departures(result, {**usual, "pretrain.epochs": number.pretrain_epochs}, (varied,))


def _labelled(
    families: Mapping[Any, Sequence[Result]], with_framework: bool = False
) -> list[tuple[str, Sequence[Result]]]:
    """A text for each line: its method, and where several would have the same text, what tells them apart."""

    def plain(result: Result) -> str:
        record = result.run.record
        return backbone_words(record) if with_framework else name(record.method)

    found = []
    for line in families.values():
        alike = [other[0] for other in families.values() if plain(other[0]) == plain(line[0])]
        telling = [f"{key} {line[0].known.get(key)}" for key in telling_keys(alike)][:3]
        found.append((", ".join([plain(line[0]), *telling]), line))
    return found


def _family(result: Result, varied: Sequence[str]) -> tuple[str, str]:
    """What a line of a plot joins: a method, all else but what is varied being equal."""
    known = {key: value for key, value in result.known.items() if key not in varied}
    return result.run.record.method, json.dumps(known, sort_keys=True, default=str)


def _points(results: Sequence[Result], x: Callable[[Result], Any]) -> list[tuple[Any, float, float, int]]:
    """x, mean, sample standard deviation and number of runs of each x."""
    by_x: dict[Any, list[float]] = defaultdict(list)
    for result in results:
        by_x[x(result)].append(result.value)
    found = [(at, summarize(values)) for at, values in by_x.items()]
    return [(at, summary.mean, math.nan if summary.std is None else summary.std, summary.n) for at, summary in found]


LABELS = ("labels", "lr_trunk", "lr_head")
BUDGET = ("pretrain.epochs", "pretrain.max_steps", "pretrain.warmup_epochs")


def budgets(results: Sequence[Result]) -> list[Plot]:
    """Accuracy over the length of pretraining (the paper's figure 5), a panel per framework."""
    accuracies = [r for r in results if r.metric.endswith("/top1") and r.run.record.pretrain_epochs]
    plots = []
    for (dataset, protocol), own in grouped(
        accuracies, lambda r: (r.run.record.dataset, r.run.record.protocol)
    ).items():
        frameworks = {}
        for framework, there in grouped(own, lambda r: r.run.record.framework).items():
            lines = grouped(there, lambda r: _family(r, BUDGET))
            kept = {key: line for key, line in lines.items() if len({r.run.record.pretrain_epochs for r in line}) > 1}
            if kept:
                frameworks[framework] = kept
        if not frameworks:
            continue
        figure, axes = panels(min(3, len(frameworks)), -(-len(frameworks) // 3), full_width=len(frameworks) > 1)
        for panel, (framework, lines) in zip(axes, frameworks.items()):
            for label, line in _labelled(lines):
                points = sorted(_points(line, lambda r: r.run.record.pretrain_epochs))
                errorbars(panel, points, line[0].run.record.method, label)
            panel.set_title(name(framework), fontsize=TEXT)
            panel.set_xlabel("epochs of pretraining")
            panel.set_ylabel("top-1 (%)")
        legend(figure, *axes)
        title = f"Training budget: {name(dataset)}, {own[0].run.record.title}"
        plots.append(
            finished_plot(
                f"budget-{dataset}-{protocol}", title, figure, f"Top-1 over epochs, {', '.join(map(name, frameworks))}."
            )
        )
    return plots


def ablations(results: Sequence[Result], published: Sequence[Published] = ()) -> list[Plot]:
    """Accuracy over the grid size and over the mask's ratio, beside the published curve."""
    return [
        *_ablation(results, published, "mix.grid", "grid size (cells per side)"),
        *_ablation(results, published, "mix.ratio", "masking ratio"),
    ]


def _ablation(results: Sequence[Result], published: Sequence[Published], key: str, label: str) -> list[Plot]:
    masked = [r for r in results if r.metric.endswith("/top1") and r.run.record.method == "mixmask"]
    places = grouped(
        (r for r in masked if r.dims[key] is not None),
        lambda r: (r.run.record.dataset, r.run.record.framework, r.run.record.protocol),
    )
    plots = []
    for place, own in places.items():
        families = grouped(own, lambda r: _family(r, (key,)))
        lines = {family: line for family, line in families.items() if len({r.dims[key] for r in line}) > 1}
        if not lines:
            continue
        theirs = {
            number.setting[1]: number.value
            for number in published
            if number.setting is not None
            and number.setting[0] == key
            and (number.dataset, number.framework, number.protocol) == place
            and any(_is_faithful(r, key, number) for line in lines.values() for r in line)
        }
        order = sorted({str(r.dims[key]) for line in lines.values() for r in line} | {*theirs}, key=_numeric)
        figure, (panel, *_) = panels(1, 1)
        for text, line in _labelled(lines):
            points = sorted(_points(line, lambda r: order.index(str(r.dims[key]))))  # noqa: B023
            errorbars(panel, points, "mixmask", text)
        if theirs:
            at = sorted(order.index(value) for value in theirs)
            panel.plot(at, [theirs[order[n]] for n in at], "x:", color="#333333", ms=6, label="published")
        panel.set_xticks(range(len(order)), order, rotation=20 if key == "mix.ratio" else 0)
        panel.set_xlabel(label)
        panel.set_ylabel("top-1 (%)")
        legend(figure, panel)
        dataset, framework, _ = place
        title = f"{name(key)}: {name(dataset)}, {name(framework)}, {own[0].run.record.title}"
        plots.append(finished_plot("-".join((key, *place)), title, figure, f"Top-1 for {', '.join(order)}."))
    return plots


def _numeric(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def label_efficiency(results: Sequence[Result]) -> list[Plot]:
    """Accuracy after finetuning over the share of labels."""
    shares = [
        r
        for r in results
        if isinstance(r.run.record.settings.get("labels"), int | float) and r.metric.endswith("/top1")
    ]
    plots = []
    for (dataset, _), own in grouped(shares, lambda r: (r.run.record.dataset, r.metric)).items():
        lines = grouped(own, lambda r: _family(r, LABELS))
        if not any(len({_share(r) for r in line}) > 1 for line in lines.values()):
            continue
        figure, (panel, *_) = panels(1, 1)
        for label, line in _labelled(lines, with_framework=True):
            errorbars(panel, sorted(_points(line, _share)), line[0].run.record.method, label)
        ticks = sorted({_share(r) for r in own})
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticklabels([f"{tick:g}" for tick in ticks])
        panel.set_xlabel("labels used (%)")
        panel.set_ylabel("top-1 (%)")
        legend(figure, panel)
        plots.append(
            finished_plot(
                f"labels-{dataset}", f"Label efficiency: {name(dataset)}", figure, "Top-1 over the share of labels."
            )
        )
    return plots


def _share(result: Result) -> float:
    return float(result.run.record.settings["labels"])


def throughput(runs: Sequence[Run]) -> list[Plot]:
    """Images per second of pretraining, on whatever it ran."""
    rate = "images_per_second"
    measured = [run for run in runs if run.record.stage == "pretrain" and run.record.metrics.get(rate, 0) > 0]
    if not measured:
        return []

    def what(run: Run) -> tuple[str, ...]:
        record = run.record
        precision = str(record.settings.get("precision", ""))
        where = f"{record.environment.get('world_size', 1)} × {record.environment.get('device', '?')}, {precision}"
        return name(record.dataset), name(record.framework), record.arch, where, record.method

    rows = sorted(grouped(measured, what).items(), key=lambda item: (item[0][:4], method_place(item[0][4])))
    figure, (panel, *_) = panels(1, 1, full_width=True, height=0.8 + 0.4 * len(rows))
    for number, (key, own) in enumerate(rows):
        summary = summarize([run.record.metrics[rate] for run in own])
        panel.barh(-number, summary.mean, xerr=summary.std or math.nan, color=style(key[4])[0], capsize=2, height=0.7)
        panel.text(summary.mean, -number, f" {summary.mean:,.0f}", va="center", fontsize=SMALL)
    names = [f"{name(key[4])}: {', '.join(key[:3])} ({key[3]})" for key, _ in rows]
    panel.set_yticks(
        [-n for n in range(len(rows))],
        ["\n".join(textwrap.wrap(short(text, 90), 46)) for text in names],
        fontsize=SMALL,
    )
    panel.set_xlabel("images per second")
    panel.margins(x=0.12)
    return [
        finished_plot(
            "throughput", "Throughput of pretraining", figure, f"Images per second of {len(rows)} kinds of run."
        )
    ]
