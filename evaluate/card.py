"""A model card for a backbone: Markdown with the metadata that model hubs read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from pydantic import TypeAdapter

from mixmask.engine.config import read_config
from mixmask.engine.errors import UserError
from mixmask.engine.normalization import STATISTICS, Normalization, statistics_of
from mixmask.engine.storage import RunDirectory
from mixmask.engine.wording import printable
from mixmask.evaluate.collect import Collection, Run, collect, flat, one_run
from mixmask.evaluate.escaping import escape_markdown
from mixmask.evaluate.names import name
from mixmask.evaluate.report import page_file, reproduce
from mixmask.evaluate.results import Result, results_of
from mixmask.evaluate.statistics import summarize

LICENSES = re.compile(r"^[a-z0-9][a-z0-9.\-]*$")
# The card has a code sample with the architecture, so only plain names are accepted.
ARCH = re.compile(r"^(timm/)?[A-Za-z0-9_.]+$")
CITED = ("mixmask", "mixmask+unmix")
CITATION = """@article{vishniakov2022mixmask,
  title   = {MixMask: Revisiting Masking Strategy for Siamese ConvNets},
  author  = {Vishniakov, Kirill and Xing, Eric and Shen, Zhiqiang},
  journal = {arXiv preprint arXiv:2210.11456},
  year    = {2022}
}"""


def write_card(run: Path, runs: Path | None, license: str) -> str:
    """The card of a pretraining run's backbone.

    Args:
        run: The folder of a finished pretraining run.
        runs: The folder in which its transfer runs are looked for; by default, the folder of runs that holds it.
        license: As hubs name them, such as ``mit`` or ``cc-by-nc-4.0``; ``unknown`` if nobody has said.

    Raises:
        UserError: If the folder is not that of a finished pretraining run.
    """
    if not LICENSES.match(license):
        raise UserError(
            f"--license {license!r}: an identifier was expected, such as mit, apache-2.0, cc-by-nc-4.0 or unknown"
        )
    found = one_run(run)
    if found.record.stage != "pretrain":
        raise UserError(
            f"{run}: a transfer run; a card is for the backbone of a pretraining run ({found.record.parent})"
        )
    if runs is None:
        place = run.resolve()
        runs = place.parent.parent if place.parent.name == "pretrain" else place
    return render_card(found, collect(runs), license)


def render_card(run: Run, collection: Collection, license: str) -> str:
    """The card as Markdown, with its YAML metadata."""
    record = run.record
    measured = [
        other
        for other in collection.distinct
        if other.record.stage == "transfer" and other.record.parent == record.fingerprint
    ]
    pools = _pooled(results_of(measured))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(page_file),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        autoescape=False,  # Markdown, escaped by its own filter
    )
    environment.filters["md"] = lambda value: escape_markdown(str(value))
    recipe = record.recipe or _recipe_file(RunDirectory(run.path).recipe_file)
    backbone = recipe.get("backbone")
    backbone = backbone if isinstance(backbone, dict) else {}
    if not ARCH.match(record.arch):
        raise UserError(
            f"{run.path}: its record names no architecture that code could name ({printable(record.arch)!r})"
        )
    training = flat(
        {key: value for key, value in recipe.items() if key not in ("data", "augment", "monitor", "backbone")}
    )
    return environment.get_template("card.md.j2").render(
        statistics=_statistics(recipe),
        metadata=yaml.safe_dump(_metadata(run, pools, license), sort_keys=False, allow_unicode=False),
        dataset=record.dataset,
        method=record.method,
        framework_name=name(record.framework),
        method_name=name(record.method),
        dataset_name=name(record.dataset),
        title=record.name,
        arch=record.arch,
        stem=backbone.get("stem", "standard"),
        timm=record.arch.removeprefix("timm/") if record.arch.startswith("timm/") else None,
        epochs=record.pretrain_epochs,
        seed=record.seed,
        facts=[
            ("file", "backbone.safetensors: the trunk, under torchvision's or timm's names"),
            ("architecture", f"{record.arch}, {backbone.get('stem', 'standard')} stem"),
            ("method", f"{name(record.framework)}, {name(record.method)}"),
            ("pretrained on", f"{name(record.dataset)}, without labels"),
            ("fingerprint", record.fingerprint),
            ("license", license),
        ],
        results=_table(pools),
        data=f"{escape_markdown(name(record.dataset))}, training split "
        f"(listing {escape_markdown(str(record.data.get('train', '?')))}); "
        "the labels were not used.",
        training=[(key, "none" if value is None else value) for key, value in training.items()],
        recipe=_fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)),
        environment=[(key, value) for key, value in record.environment.items() if value is not None],
        command=_fenced(reproduce(run, "recipe.yaml  # the recipe above")),
        citation=CITATION if record.method in CITED else None,
    )


def _statistics(recipe: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation that normalised the images: ImageNet's, or those in the recipe."""
    augment, backbone = recipe.get("augment"), recipe.get("backbone")
    given = augment.get("normalization", "imagenet") if isinstance(augment, dict) else "imagenet"
    channels = backbone.get("in_channels", 3) if isinstance(backbone, dict) else 3
    try:
        return statistics_of(TypeAdapter(Normalization).validate_python(given), channels)
    except ValueError:
        return STATISTICS["imagenet"]


def _recipe_file(path: Path) -> dict[str, Any]:
    """The recipe of a run whose record is too old to hold it."""
    try:
        found = read_config(path)[0]
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _fenced(text: str) -> str:
    """Text for a code fence, which cannot end the fence."""
    return "\n".join(map(printable, text.rstrip().splitlines())).replace("```", "'''")


def _pooled(results: Sequence[Result]) -> list[list[Result]]:
    """Group the results that differ in seeds only, in the order of protocols and data sets."""
    pools: dict[tuple[str, ...], list[Result]] = {}
    for result in sorted(results, key=lambda result: (result.run.record.protocol, result.run.record.dataset)):
        pools.setdefault(result.pool, []).append(result)
    return [*pools.values()]


def _table(pools: Sequence[Sequence[Result]]) -> str:
    """A Markdown table with one line per number, each with the settings that a reader needs to interpret it."""
    lines = ["| protocol | data | metric | value (%) | runs | settings |", "|---|---|---|---:|---:|---|"]
    for pool in pools:
        record = pool[0].run.record
        summary = summarize([result.value for result in pool])
        value = f"{summary.mean:.1f}" + (f" ± {summary.std:.1f}" if summary.std is not None else "")
        settings = ", ".join(f"{key} {setting}" for key, setting in record.settings.items() if setting is not None)
        label = record.metric_name(pool[0].metric)
        if summary.n < record.num_seeds:
            value += f" (fewer than {record.num_seeds} runs)"
        cells = (record.title, name(record.dataset), label, value, summary.n, settings)
        lines.append("| " + " | ".join(escape_markdown(str(cell)) for cell in cells) + " |")
    return "\n".join(lines) if pools else ""


def _metadata(run: Run, pools: Sequence[Sequence[Result]], license: str) -> dict[str, Any]:
    """What hubs read: the fields of Hugging Face's model cards, results as a model index."""
    record = run.record
    by_measurement: dict[tuple[str, str, str, str], list[Sequence[Result]]] = {}
    for pool in pools:
        first = pool[0].run.record
        key = (first.protocol, first.dataset, first.protocol_fingerprint, first.task)
        by_measurement.setdefault(key, []).append(pool)
    results = [
        {
            "task": {"type": task},
            "dataset": {"name": printable(name(dataset)), "type": printable(dataset)},
            "metrics": [
                {
                    "type": printable(pool[0].metric),
                    "name": printable(f"{pool[0].run.record.title} {pool[0].run.record.metric_name(pool[0].metric)}"),
                    "value": round(summarize([result.value for result in pool]).mean, 2),
                }
                for pool in own
            ],
        }
        for (_, dataset, _, task), own in by_measurement.items()
    ]
    return {
        "license": license,
        "library_name": "timm" if record.arch.startswith("timm/") else "pytorch",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised-learning", printable(record.framework), record.method],
        "datasets": [printable(record.dataset)],
        **({"model-index": [{"name": printable(record.name), "results": results}]} if results else {}),
    }
