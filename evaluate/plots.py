"""Plots of finished runs, for people who cannot tell some colours apart, too."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
from matplotlib.ticker import FixedLocator, NullLocator

from mixmask.engine.storage import RunDirectory
from mixmask.evaluate.collect import Run
from mixmask.evaluate.drawing import Plot, errorbars, finished_plot, legend, panels, short, style
from mixmask.evaluate.logs import number_of, read_log
from mixmask.evaluate.names import average_precision_name, method_place, name
from mixmask.evaluate.published import Published
from mixmask.evaluate.reference import departures, stated
from mixmask.evaluate.results import Result, backbone_words, results_of, telling_keys
from mixmask.evaluate.statistics import summarize

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
DIAGNOSTICS = (
    "step",
    "of",
    "lr",
    "seconds",
    "images_per_second",
    "data_wait_share",
    "feature_std",
    "rank_me",
    "alignment",
    "uniformity",
    "contrast_accuracy",
)
MOST_LINES = 12  # in one panel: more cannot be told apart


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
            *average_precisions(results),
            *label_efficiency(results),
            *throughput(runs),
        ]
    seen: Counter[str] = Counter()
    unique = []
    for plot in plots:
        seen[plot.id] += 1
        unique.append(plot if seen[plot.id] == 1 else replace(plot, id=f"{plot.id}-{seen[plot.id]}"))
    return unique


# --- training --------------------------------------------------------------------------------------------------------


def training_curves(runs: Sequence[Run]) -> list[Plot]:
    """Loss, its terms and kNN accuracy over epochs (as the paper's figure 7), one figure per data set and framework."""
    pretrained = [run for run in runs if run.record.stage == "pretrain" and run.record.pretrain_epochs]
    logs = {run: entries for run in pretrained if len(entries := read_log(RunDirectory(run.path).log_file)) > 1}
    plots = []
    for (dataset, framework), own in _grouped(logs, lambda run: (run.record.dataset, run.record.framework)).items():
        keys = dict.fromkeys(key for run in own for entry in logs[run] for key in entry if key not in DIAGNOSTICS)
        shown = sorted(
            (key for key in keys if _plottable(key, own, logs)), key=lambda key: (key != "loss", "/" in key, key)
        )
        if not shown:
            continue
        columns = min(3, len(shown))
        figure, axes = panels(columns, -(-len(shown) // columns))
        labels = _labels(own)
        for panel, key in zip(axes, shown):
            for run in own[:MOST_LINES]:
                last = max(number_of(logs[run][-1], "of") or 0.0, number_of(logs[run][-1], "step") or 0.0, 1.0)
                scale = (run.record.pretrain_epochs or 0) / last
                values = [(number_of(entry, "step"), number_of(entry, key)) for entry in logs[run]]
                finite = [(step * scale, value) for step, value in values if step is not None and value is not None]
                colour, marker, dash = style(run.record.method)
                every = max(len(finite) // 8, 1)
                panel.plot(*zip(*finite) if finite else ((), ()), dash, color=colour, lw=1.3, label=labels[run],
                           marker=marker, markevery=every, ms=4)  # fmt: skip
            panel.set_title(f"{key.split('/')[0]} top-1 (%)" if key.endswith("top1") else key, fontsize=9)
            panel.set_xlabel("epochs")
        legend(figure, axes[0])
        title = f"Training of {name(framework)} on {name(dataset)}"
        left = f" ({MOST_LINES} of {len(own)} runs)" if len(own) > MOST_LINES else ""
        text = f"{', '.join(shown)} over epochs, for {', '.join(labels[run] for run in own[:MOST_LINES])}{left}."
        plots.append(finished_plot(f"training-{dataset}-{framework}", title + left, figure, text))
    return plots


def _plottable(key: str, runs: Sequence[Run], logs: Mapping[Run, Sequence[Mapping[str, Any]]]) -> bool:
    return any(number_of(entry, key) is not None for run in runs for entry in logs[run])


def _labels(runs: Sequence[Run]) -> dict[Run, str]:
    """A method's name, and a run's own where several would have the same."""
    counts = Counter(run.record.method for run in runs)
    return {
        run: name(run.record.method)
        + (f" ({run.record.name}, seed {run.record.seed})" if counts[run.record.method] > 1 else "")
        for run in runs
    }


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
    for (dataset, protocol), own in _grouped(
        accuracies, lambda r: (r.run.record.dataset, r.run.record.protocol)
    ).items():
        frameworks = {}
        for framework, there in _grouped(own, lambda r: r.run.record.framework).items():
            lines = _grouped(there, lambda r: _family(r, BUDGET))
            kept = {key: line for key, line in lines.items() if len({r.run.record.pretrain_epochs for r in line}) > 1}
            if kept:
                frameworks[framework] = kept
        if not frameworks:
            continue
        figure, axes = panels(min(3, len(frameworks)), -(-len(frameworks) // 3))
        for panel, (framework, lines) in zip(axes, frameworks.items()):
            for label, line in _labelled(lines):
                points = sorted(_points(line, lambda r: r.run.record.pretrain_epochs))
                errorbars(panel, points, line[0].run.record.method, label)
            panel.set_title(name(framework), fontsize=9)
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
    places = _grouped(
        (r for r in masked if r.dims[key] is not None),
        lambda r: (r.run.record.dataset, r.run.record.framework, r.run.record.protocol),
    )
    plots = []
    for place, own in places.items():
        families = _grouped(own, lambda r: _family(r, (key,)))
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
    for (dataset, _), own in _grouped(shares, lambda r: (r.run.record.dataset, r.metric)).items():
        lines = _grouped(own, lambda r: _family(r, LABELS))
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


def average_precisions(results: Sequence[Result]) -> list[Plot]:
    """Bars of average precisions with their standard deviations, one figure per data set and way of measuring."""
    detections = [r for r in results if average_precision_name(r.metric)]
    plots = []
    measured = _grouped(detections, lambda r: (r.run.record.dataset, r.run.record.protocol, r.measurement))
    for (dataset, protocol, recipe), own in measured.items():
        bars = _grouped(own, lambda r: r.pool[:5])
        metrics = [metric for metric in own[0].run.record.headlines if any(r.metric == metric for r in own)]
        figure, (panel, *_) = panels(1, 1, width=max(5.0, 0.35 * len(metrics) * (len(bars) + 1)))
        for number, (pool, there) in enumerate(
            sorted(bars.items(), key=lambda item: (method_place(item[0][2]), item[0]))
        ):
            summaries = {m: summarize(values) for m in metrics if (values := [r.value for r in there if r.metric == m])}
            at = [metrics.index(m) + (number - (len(bars) - 1) / 2) * 0.8 / len(bars) for m in summaries]
            panel.bar(
                at,
                [s.mean for s in summaries.values()],
                0.8 / len(bars),
                yerr=[math.nan if s.std is None else s.std for s in summaries.values()],
                capsize=2,
                color=style(pool[2])[0],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor="white",
                linewidth=0.5,
                label=f"{backbone_words(there[0].run.record)}, n = {max(s.n for s in summaries.values())}",
            )
            for place, summary in zip(at, summaries.values(), strict=True):
                height = summary.mean + (summary.std or 0.0)
                panel.annotate(
                    f"{summary.mean:.1f}",
                    (place, height),
                    (0, 4),
                    textcoords="offset points",
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=6,
                )
        panel.set_xticks(
            range(len(metrics)), [average_precision_name(metric) or metric for metric in metrics], fontsize=8
        )
        panel.set_ylabel("average precision (%)")
        panel.margins(y=0.14)
        legend(figure, panel)
        same = sum(1 for other in measured if other[:2] == (dataset, protocol)) > 1
        settings = own[0].run.record.settings
        which = f", {settings.get('engine')}, {settings.get('iterations')} iterations" if same else ""
        title = f"Detection: {name(dataset)}{which}"
        text = f"Box and mask average precision of {len(bars)} backbones; lines are standard deviations over runs."
        plots.append(finished_plot(f"ap-{dataset}-{recipe[:8]}" if same else f"ap-{dataset}", title, figure, text))
    return plots


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

    rows = sorted(_grouped(measured, what).items(), key=lambda item: (item[0][:4], method_place(item[0][4])))
    figure, (panel, *_) = panels(1, 1, width=7.5, height=0.8 + 0.32 * len(rows))
    for number, (key, own) in enumerate(rows):
        summary = summarize([run.record.metrics[rate] for run in own])
        panel.barh(-number, summary.mean, xerr=summary.std or math.nan, color=style(key[4])[0], capsize=2, height=0.7)
        panel.text(summary.mean, -number, f" {summary.mean:,.0f}", va="center", fontsize=7)
    names = [f"{name(key[4])}: {', '.join(key[:3])} ({key[3]})" for key, _ in rows]
    panel.set_yticks([-n for n in range(len(rows))], [short(text, 90) for text in names], fontsize=7)
    panel.set_xlabel("images per second")
    panel.margins(x=0.12)
    return [
        finished_plot(
            "throughput", "Throughput of pretraining", figure, f"Images per second of {len(rows)} kinds of run."
        )
    ]


# --- grouping --------------------------------------------------------------------------------------------------------


def _grouped(items: Any, key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """By a key, in the order of the keys."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(sorted(groups.items(), key=lambda pair: repr(pair[0])))
