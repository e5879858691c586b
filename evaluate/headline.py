"""What a report says in its first lines: the finding, when and with what it was made, and what it cannot show."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version

from mixmask.evaluate.collect import Run
from mixmask.evaluate.comparison import Comparison
from mixmask.evaluate.results import first_headline, results_of

DEMO = "demo-"  # what the names of the demo's data sets begin with
DEMO_CAVEAT = (
    "These numbers show that every stage works and learns. They come from minutes of training on a few thousand synthetic "
    "pictures, with one seed: they do not rank the methods, and nothing in them can be compared with a published number."
)


def finding(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    """The main result in one or two sentences; it claims a difference only where an interval excludes zero.

    Args:
        runs: Finished runs.
        comparisons: Of other methods with vanilla, on the headline metrics.
    """
    measured = [one for one in results_of(runs) if first_headline(one)]
    if not measured:
        return "Nothing has been measured on these backbones yet: mixmask transfer does that."
    sure = [(one, one.result.low, one.result.high) for one in comparisons]
    known = [(one, low, high) for one, low, high in sure if low is not None and high is not None]
    if known:
        better = [one for one, low, _ in known if low > 0]
        worse = [one for one, _, high in known if high < 0]
        parts = [
            f"{_count(group, known)} {word}"
            for group, word in ((better, "above vanilla"), (worse, "below it"))
            if group
        ]
        even = len(known) - len(better) - len(worse)
        if even:
            parts.append(f"{even} of {len(known)} not significantly different from it")
        top = max(known, key=lambda item: item[0].result.value)[0]
        return (
            f"Compared with vanilla at 95 % confidence: {', '.join(parts)}. "
            f"The largest difference: {top.first} on {top.what}, {top.result.value:+.1f} points "
            f"[{top.result.low:.1f}, {top.result.high:.1f}], {_seeds(top)}."
        )
    only = "Every backbone has a single run" if not comparisons or _single(comparisons) else "There are too few seeds"
    return f"{only}, so nothing is said here about which method is better."


def _count(group: Sequence[Comparison], of: Sequence[object]) -> str:
    return f"{len(group)} of {len(of)} results"


def _seeds(one: Comparison) -> str:
    return " and ".join(map(str, dict.fromkeys(one.result.n))) + " seeds"


def _single(comparisons: Sequence[Comparison]) -> bool:
    return all(max(one.result.n) == 1 for one in comparisons)


def facts(runs: Sequence[Run], today: date) -> str:
    """When the page was made, by what version, and how long its runs took together."""
    try:
        by = f"mixmask {version('mixmask')}"
    except PackageNotFoundError:
        by = "mixmask"
    hours = sum(run.record.seconds for run in runs) / 3600
    took = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    devices = sorted({str(run.record.environment.get("device", "?")) for run in runs})
    where = f" on {', '.join(devices)}" if len(devices) <= 3 else f" on {len(devices)} kinds of device"
    return f"Made on {today.isoformat()} by {by}. The runs took {took} in all{where}."


def caveats(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before the numbers."""
    demo = [run for run in runs if run.record.dataset.startswith(DEMO)]
    if not demo:
        return []
    return [DEMO_CAVEAT if len(demo) == len(runs) else f"Of the runs on synthetic pictures ({DEMO}…): {DEMO_CAVEAT}"]
