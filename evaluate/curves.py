"""Training curves: losses and kNN accuracy over epochs (as the paper's figure 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mixmask.engine.storage import RunDirectory
from mixmask.evaluate.collect import Run
from mixmask.evaluate.drawing import TEXT, Plot, finished_plot, grouped, legend, panels, style
from mixmask.evaluate.logs import number_of, read_log
from mixmask.evaluate.names import name

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

Log = Sequence[Mapping[str, Any]]


def training_curves(runs: Sequence[Run]) -> list[Plot]:
    """One figure per data set and framework, with a panel for each kind of loss.

    Total losses share a panel only if they are sums of the same terms: a sum of two losses is larger than one of them,
    whatever was learnt.
    """
    pretrained = [run for run in runs if run.record.stage == "pretrain" and run.record.pretrain_epochs]
    logs = {run: entries for run in pretrained if len(entries := read_log(RunDirectory(run.path).log_file)) > 1}
    plots = []
    for (dataset, framework), own in grouped(logs, lambda run: (run.record.dataset, run.record.framework)).items():
        shown = _panels(own[:MOST_LINES], logs)
        if not shown:
            continue
        columns = 2 if len(shown) == 4 else min(3, len(shown))
        figure, axes = panels(columns, -(-len(shown) // columns), full_width=columns > 1)
        labels = _labels(own)
        for panel, (title, key, there) in zip(axes, shown):
            for run in there:
                last = max(number_of(logs[run][-1], "of") or 0.0, number_of(logs[run][-1], "step") or 0.0, 1.0)
                scale = (run.record.pretrain_epochs or 0) / last
                values = [(number_of(entry, "step"), number_of(entry, key)) for entry in logs[run]]
                finite = [(step * scale, value) for step, value in values if step is not None and value is not None]
                colour, marker, dash = style(run.record.method)
                every = max(len(finite) // 8, 1)
                panel.plot(*zip(*finite) if finite else ((), ()), dash, color=colour, lw=1.3, label=labels[run],
                           marker=marker, markevery=every, ms=4)  # fmt: skip
            panel.set_title(title, fontsize=TEXT)
            panel.set_xlabel("epochs", fontsize=TEXT)
        legend(figure, *axes)
        title = f"Training of {name(framework)} on {name(dataset)}"
        left = f" ({MOST_LINES} of {len(own)} runs)" if len(own) > MOST_LINES else ""
        text = f"{', '.join(t for t, *_ in shown)} over epochs, for {', '.join(labels[r] for r in own[:MOST_LINES])}{left}."
        plots.append(finished_plot(f"training-{dataset}-{framework}", title + left, figure, text))
    return plots


def _panels(runs: Sequence[Run], logs: Mapping[Run, Log]) -> list[tuple[str, str, list[Run]]]:
    """Title, key and runs of each panel: totals of several terms, single terms, then accuracies."""
    keys = {run: [key for key in _keys(logs[run]) if _plottable(key, logs[run])] for run in runs}
    terms = {run: tuple(sorted(key for key in keys[run] if key != "loss" and "/" not in key)) for run in runs}
    found: list[tuple[str, str, list[Run]]] = []
    for parts, there in grouped([run for run in runs if "loss" in keys[run]], lambda run: terms[run]).items():
        if len(parts) != 1:  # the total of a single term is that term
            words = " + ".join(_words(part) for part in parts)
            found.append((f"total loss: {words}" if parts else "loss", "loss", there))
    every = sorted({key for own in keys.values() for key in own} - {"loss"}, key=lambda key: ("/" in key, key))
    for key in every:
        there = [run for run in runs if key in keys[run]]
        title = f"{key.split('/')[0]} top-1 (%)" if key.endswith("top1") else f"loss: {_words(key)}"
        found.append((title.replace("knn", "kNN"), key, there))
    return found


def _keys(log: Log) -> list[str]:
    return [*dict.fromkeys(key for entry in log for key in entry if key not in DIAGNOSTICS)]


def _plottable(key: str, log: Log) -> bool:
    return any(number_of(entry, key) is not None for entry in log)


def _words(term: str) -> str:
    """A term of the loss as its panel names it."""
    return (
        "clean views" if term == "clean" else f"{name(term)} images" if name(term) != term else term.replace("_", " ")
    )


def _labels(runs: Sequence[Run]) -> dict[Run, str]:
    """A method's name, and a run's own where several would have the same."""
    counts = Counter(run.record.method for run in runs)
    return {
        run: name(run.record.method)
        + (f" ({run.record.name}, seed {run.record.seed})" if counts[run.record.method] > 1 else "")
        for run in runs
    }
